"""The composition root: makes every part, connects them, starts them in order and stops them in the reverse order.

The only module that knows all parts. Holds no logic of its own: a line here that decides something belongs elsewhere.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fleetmind import __version__
from fleetmind.api.auth import FIRST_KEY_SCOPES, KeyRing, pepper_from
from fleetmind.api.doctor import Doctor
from fleetmind.api.manage import Parts
from fleetmind.api.server import application, bind, check_exposure, http_server, url_of
from fleetmind.core.clock import Clock, SystemClock, secret_token
from fleetmind.core.config import Configuration
from fleetmind.core.errors import ConfigurationError, Conflict, FleetmindError
from fleetmind.core.events import Event, EventKind
from fleetmind.core.supervise import Supervisor
from fleetmind.core.telemetry import Metrics, Spans, configure_logs, log
from fleetmind.core.types import ReplicaId, format_bytes
from fleetmind.fleet.catalog import Catalog
from fleetmind.fleet.inventory import Inventory
from fleetmind.fleet.packaged import SMOLLM2
from fleetmind.fleet.reconcile import Reconciler
from fleetmind.fleet.snapshot import FleetSnapshot, ModelSource
from fleetmind.gateway.accounting import Accounting
from fleetmind.gateway.dispatch import Gateway
from fleetmind.gateway.limits import QueuePolicy
from fleetmind.gateway.upstream import Patience
from fleetmind.node.daemon import NodeDaemon
from fleetmind.node.devices import open_devices
from fleetmind.node.engines.registry import engines
from fleetmind.node.ledger import Orphan
from fleetmind.node.protocol import Ability
from fleetmind.store.database import Database
from fleetmind.store.journal import Journal
from fleetmind.store.keys import Keys
from fleetmind.store.models import Models
from fleetmind.store.usage import Usage

WRITE_LAST_USED_INTERVAL_S = 30.0
VERIFY_S_MAX = 3.0
PRUNE_INTERVAL_S = 60.0
DAY_S = 86400.0
LOOPS_STOP_S_MAX = 10.0
FIRST_READY_S_MAX = 60.0
"""How long ``on_ready`` waits for the models that are to be served from the start; they go on loading after it."""

_log = log(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """What a server that has just started tells its owner. ``first_key`` is there on the very first start only."""

    url: str
    first_key: str | None
    token_file: Path
    devices: tuple[str, ...]
    models: tuple[str, ...]
    ready_s: float
    notes: tuple[str, ...]


async def serve(home: Path, configuration: Configuration, *, on_ready: Callable[[Started], None]) -> None:
    """Run a server on ``home`` until SIGTERM, SIGINT or a call to ``/api/stop``, then stop it in order.

    Raises Conflict for a second server on the same home or a port in use, ConfigurationError, StoreError.
    """
    clock = SystemClock()
    began_s = clock.monotonic_s()
    _make_home(home)
    settings = configuration.settings
    check_exposure(settings.server)
    log_file = home / "logs" / "server.log"
    with _locked(home), contextlib.closing(bind(settings.server)) as listener:
        configure_logs(settings.logs, log_file)
        stopping = asyncio.Event()
        url = url_of(settings.server, listener)
        async with _parts(home, configuration, clock, url, log_file, stopping.set) as (parts, notes, is_first_start):
            http = http_server(application(parts), configuration)
            serving = asyncio.get_running_loop().create_task(http.serve(sockets=[listener]))

            def stop() -> None:
                http.force_exit = stopping.is_set()  # asked twice: without waiting for calls
                stopping.set()

            with _signals(stop), _discoverable(home, parts):
                await _wait_for_models(parts, stopping, serving)
                first_key = await _first_key(parts.keys) if is_first_start else None
                on_ready(
                    Started(
                        url=url,
                        first_key=first_key,
                        token_file=home / "run" / "token",
                        devices=tuple(_device_words(parts.inventory.snapshot())),
                        models=tuple(_model_words(parts.inventory.snapshot())),
                        ready_s=clock.monotonic_s() - began_s,
                        notes=notes,
                    )
                )
                if is_first_start:
                    await _record_first_start(parts.journal, clock)
                await _first_of(stopping.wait(), serving)
            http.should_exit = True
            await serving


def _make_home(home: Path) -> None:
    """Make the state folder, readable by this user only. Raises ConfigurationError where that can't be."""
    os.umask(0o077)
    try:
        for folder in (home, home / "run", home / "logs", home / "models"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / "run" / "lock").touch(mode=0o600)
    except OSError as error:
        raise ConfigurationError(
            f"{home} can't be used to keep state: {error.strerror or error}.",
            hint="Give a folder of your own that can be written: --home DIR, or FLEETMIND_HOME.",
        ) from None


@contextlib.asynccontextmanager
async def _parts(
    home: Path,
    configuration: Configuration,
    clock: Clock,
    url: str,
    log_file: Path,
    stop: Callable[[], None],
) -> AsyncIterator[tuple[Parts, tuple[str, ...], bool]]:
    """All parts, running. Yields them with notes for the owner, and whether this is the first start."""
    settings = configuration.settings
    metrics, spans = Metrics(), Spans(settings.telemetry)
    supervisor = Supervisor(clock, _log, on_restart=lambda name: metrics.loop_restarts_total.labels(name).inc())
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(spans.close)
        database = await Database.open(
            settings.store.url or f"sqlite:///{home / 'fleetmind.db'}",
            commit_interval_s=settings.store.commit_interval_ms / 1000,
            metrics=metrics,
        )
        stack.push_async_callback(database.close)
        had_pepper = (home / "pepper").exists()
        journal, usage, keys = Journal(database), Usage(database), KeyRing(Keys(database), _pepper(home), clock)
        had_pepper = had_pepper or not await keys.records()
        await keys.load()
        catalog = Catalog(Models(database), settings, clock, home=home)
        notes = await catalog.load()
        if not had_pepper:
            notes += ("the file pepper was missing: no key made before opens any more; make new ones",)
        is_first_start = not await journal.entries(kind=EventKind.KEY_SHOWN, limit=1)
        if is_first_start:
            notes += await _seed(catalog, settings.models.preload)
        found_engines = await engines(settings.node, os.environ)
        ahead = {name: engine.facts.calls_ahead for name, engine in found_engines.items()}
        inventory = Inventory(catalog, clock, calls_ahead=ahead)
        node = NodeDaemon(
            run_dir=home / "run",
            log_dir=home / "logs" / "replicas",
            devices=open_devices(settings.node, clock),
            engines=found_engines,
            settings=settings.node,
            clock=clock,
            on_change=inventory.observe_replica,
        )
        orphans = await node.start()
        stack.push_async_callback(node.close)
        inventory.set_devices(node.devices())
        inventory.observe_readings(await node.read())
        accounting = Accounting(usage.append, metrics=metrics)
        stack.push_async_callback(accounting.flush)
        gateway = Gateway(
            snapshot=inventory.snapshot,
            verify=lambda replica_id, reason: _verify(node, replica_id, reason),
            accounting=accounting,
            clock=clock,
            spans=spans,
            queue=QueuePolicy(settings.gateway.queue_calls_max, settings.gateway.queue_wait_s_max),
            patience=Patience(
                settings.gateway.first_token_s_max, settings.gateway.stream_idle_s_max, settings.gateway.reply_s_max
            ),
            retries_max=settings.gateway.retries_max,
        )
        stack.push_async_callback(gateway.close)
        inventory.subscribe(gateway.fleet_changed)
        reconciler = Reconciler(
            catalog=catalog,
            inventory=inventory,
            node=node,
            journal=journal,
            settings=settings.fleet,
            clock=clock,
            metrics=metrics,
            engine_kinds={name: engine.facts.device_kinds for name, engine in found_engines.items()},
            outstanding=lambda replica_id: gateway.seats.outstanding.get(replica_id, 0),
        )
        started_at_s = psutil.Process().create_time()
        await _record_start(journal, clock, orphans)
        stack.push_async_callback(_record_stop, journal, clock)

        for name, run in {**node.loops(), **reconciler.loops()}.items():
            supervisor.add(name, run)
        supervisor.add("usage", accounting.flush, interval_s=settings.gateway.usage_flush_s)
        supervisor.add(
            "usage.prune",
            lambda: usage.prune(clock.now_s() - settings.store.usage_days_kept * DAY_S),
            interval_s=PRUNE_INTERVAL_S,
        )
        supervisor.add("keys", keys.write_last_used, interval_s=WRITE_LAST_USED_INTERVAL_S)
        await supervisor.start()
        stack.push_async_callback(supervisor.stop, LOOPS_STOP_S_MAX)
        doctor = Doctor(
            home=home,
            configuration=configuration,
            database=database,
            journal=journal,
            inventory=inventory,
            supervisor=supervisor,
        )
        parts = Parts(
            configuration=configuration,
            catalog=catalog,
            inventory=inventory,
            reconciler=reconciler,
            node=node,
            gateway=gateway,
            keys=keys,
            journal=journal,
            usage=usage,
            supervisor=supervisor,
            metrics=metrics,
            doctor=doctor,
            clock=clock,
            url=url,
            pid=os.getpid(),
            started_at_s=started_at_s,
            log_file=log_file,
            stop=stop,
        )
        yield parts, notes, is_first_start


async def _verify(node: NodeDaemon, replica_id: ReplicaId, reason: str) -> None:
    """Let the node look at a replica that failed a call, for a bounded time."""
    _log.warning("a call failed at a replica", replica=replica_id, reason=reason)
    with contextlib.suppress(TimeoutError, FleetmindError):
        async with asyncio.timeout(VERIFY_S_MAX):
            await node.check(replica_id)


async def _seed(catalog: Catalog, names: Sequence[str]) -> tuple[str, ...]:
    """Put the models of the first start into the catalogue; returns a sentence for each that can't be."""
    notes = []
    for name in names:
        try:
            if name == SMOLLM2.model:
                await catalog.add_packaged()
            elif catalog.find(name) is None:
                notes.append(
                    f"models.preload names {name}, which is not in the catalogue; add it: fleetmind models add"
                )
        except FleetmindError as error:
            notes.append(f"{name} is not served: {error.message} {error.hint}".rstrip())
    return tuple(notes)


async def _first_key(keys: KeyRing) -> str:
    """The text of the first key, which is shown once."""
    _, text = await keys.create("first", FIRST_KEY_SCOPES, created_by="setup")
    return text


async def _record_first_start(journal: Journal, clock: Clock) -> None:
    """Written after the owner was told: a first start that was killed before that is a first start again, since the key
    it may have made is one that nobody has seen."""
    await journal.append(Event(EventKind.KEY_SHOWN, "first", clock.now_s()))


async def _record_start(journal: Journal, clock: Clock, orphans: tuple[Orphan, ...]) -> None:
    now_s = clock.now_s()
    ended = [Event(EventKind.ORPHAN_ENDED, orphan.replica_id, now_s, {"pid": orphan.pid}) for orphan in orphans]
    await journal.append(*ended, Event(EventKind.SERVER_STARTED, "server", now_s, {"version": __version__}))


async def _record_stop(journal: Journal, clock: Clock) -> None:
    with contextlib.suppress(FleetmindError):
        await journal.append(Event(EventKind.SERVER_STOPPED, "server", clock.now_s()))


async def _wait_for_models(parts: Parts, stopping: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """Return when every wanted model is served or has failed, or after a while."""
    settled = asyncio.Event()

    def look(fleet: FleetSnapshot) -> None:
        waiting = [m for m in fleet.models.values() if m.replicas_wanted > 0 and m.name not in fleet.ready]
        if all(m.name in fleet.statuses and fleet.statuses[m.name].is_failed for m in waiting):
            settled.set()

    parts.inventory.subscribe(look)
    look(parts.inventory.snapshot())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_READY_S_MAX):
            await _first_of(settled.wait(), stopping.wait(), serving)


async def _first_of(*waits: Awaitable[object]) -> None:
    """Return when one of ``waits`` is over. Tasks among them live on."""
    tasks = [wait if isinstance(wait, asyncio.Task) else asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the home for this server alone. Raises Conflict."""
    descriptor = os.open(home / "run" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(
                f"Another server is running on {home}.",
                hint="`fleetmind status` shows it, `fleetmind down` stops it; or give another --home.",
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _discoverable(home: Path, parts: Parts) -> Iterator[None]:
    """Let the command line of the same user find the server and speak to it with all rights."""
    token = parts.keys.add_operator()
    address: dict[str, object] = {
        "url": parts.url,
        "pid": parts.pid,
        "started_at_s": parts.started_at_s,
        "token": token,
    }
    certificate = parts.configuration.settings.server.tls_certificate
    if certificate:  # the command line trusts exactly this one
        address["tls_certificate"] = str(Path(certificate).resolve())
    files = {home / "run" / "token": token, home / "run" / "server.json": json.dumps(address)}
    for path, text in files.items():
        _write_private(path, text.encode())
    try:
        yield
    finally:
        for path in files:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """End in order on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _pepper(home: Path) -> bytes:
    """This installation's secret; made on the first start."""
    path = home / "pepper"
    if not path.exists():
        _write_private(path, secret_token(32))
    return pepper_from(path.read_bytes())


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, whole or not at all."""
    partial = path.with_suffix(".part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    partial.rename(path)


def _device_words(fleet: FleetSnapshot) -> Iterator[str]:
    for view in fleet.devices:
        is_unsaid = view.device.is_simulated and "simulated" not in view.device.name
        simulated = " (simulated)" if is_unsaid else ""
        yield f"{view.device.name}, {format_bytes(view.device.memory_bytes_total)}{simulated}"


def _model_words(fleet: FleetSnapshot) -> Iterator[str]:
    """Real models that can chat come first: the first is what a new owner is shown how to ask."""
    for model in sorted(
        fleet.models.values(),
        key=lambda model: (model.source is ModelSource.FAKE, Ability.CHAT not in model.abilities, model.name),
    ):
        if model.name in fleet.ready:
            yield f"{model.name}: ready{' (simulated)' if model.source is ModelSource.FAKE else ''}"
        elif model.replicas_wanted:
            status = fleet.statuses.get(model.name)
            yield f"{model.name}: {status.reason if status else 'loading'}"
