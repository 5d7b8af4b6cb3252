"""Everything but calls to models: status, catalogue, replicas, keys, configuration, journal, health, metrics, the page.

Routes only translate between HTTP and the parts they are given; what a part refuses leaves as its error. Every route
declares who may use it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fleetmind import __version__
from fleetmind.api import schemas, views
from fleetmind.api.auth import KeyRing, Principal, Scope
from fleetmind.api.doctor import Doctor
from fleetmind.api.gate import not_found
from fleetmind.api.openai import entry_of
from fleetmind.api.page import add_page
from fleetmind.api.problems import body_of, headers_of, status_of
from fleetmind.api.routes import PRINCIPAL, PUBLIC, DirectRoute, GuardedRoute, allow
from fleetmind.core.clock import Clock
from fleetmind.core.config import Configuration
from fleetmind.core.errors import FleetmindError, InternalError, InvalidRequest, ModelNotFound
from fleetmind.core.supervise import Supervisor
from fleetmind.core.telemetry import Metrics, log
from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.fleet.catalog import Catalog
from fleetmind.fleet.fit import fit
from fleetmind.fleet.gguf import read_header
from fleetmind.fleet.inventory import Inventory
from fleetmind.fleet.reconcile import Reconciler
from fleetmind.fleet.snapshot import FleetSnapshot, Model
from fleetmind.gateway.calls import model_not_found
from fleetmind.gateway.dispatch import Gateway
from fleetmind.gateway.routing import explain
from fleetmind.node.daemon import NodeDaemon
from fleetmind.node.logs import read_tail
from fleetmind.node.protocol import Ability
from fleetmind.store.journal import Journal
from fleetmind.store.usage import Usage

_log = log(__name__)

LOG_LINES_MAX = 10_000
POSITION_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running server that the api shows and steers."""

    configuration: Configuration
    catalog: Catalog
    inventory: Inventory
    reconciler: Reconciler
    node: NodeDaemon
    gateway: Gateway
    keys: KeyRing
    journal: Journal
    usage: Usage
    supervisor: Supervisor
    metrics: Metrics
    doctor: Doctor
    clock: Clock
    url: str
    pid: int
    started_at_s: float
    log_file: Path
    stop: Callable[[], None]


def build(parts: Parts, direct: list[DirectRoute]) -> FastAPI:
    """The FastAPI application with all routes, ``direct`` ones among them."""
    app = FastAPI(
        title="Fleetmind",
        version=__version__,
        description="Status and control. Calls to models are OpenAI-compatible, below /v1.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.router.route_class = GuardedRoute
    app.router.default = not_found
    app.router.redirect_slashes = False
    app.add_exception_handler(FleetmindError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_values)
    app.add_exception_handler(HTTPException, _refuse_plain)
    app.add_exception_handler(Exception, _refuse_ours)
    app.router.routes.extend(direct)
    add_page(app)
    _add_public(app, parts)
    _add_status(app, parts)
    _add_models(app, parts)
    _add_replicas(app, parts)
    _add_keys(app, parts)
    _add_records(app, parts)
    return app


def _add_public(app: FastAPI, parts: Parts) -> None:
    @app.get("/health", tags=["health"])
    @allow(PUBLIC)
    async def health() -> schemas.HealthOut:
        """Whether the server runs."""
        return schemas.HealthOut(status="ok", version=__version__)

    @app.get("/ready", tags=["health"], responses={503: {"model": schemas.ReadyOut}})
    @allow(PUBLIC)
    async def ready(response: Response) -> schemas.ReadyOut:
        """Whether every wanted model is served."""
        is_ready, reason = readiness(parts.inventory.snapshot())
        response.status_code = 200 if is_ready else 503
        return schemas.ReadyOut(ready=is_ready, reason=reason)

    @app.get("/metrics", tags=["health"], response_class=Response)
    @allow(Scope.METRICS)
    async def metrics() -> Response:
        """Prometheus' text format."""
        _set_gauges(parts)
        return Response(parts.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/api/openapi.json", include_in_schema=False)
    @allow(Scope.READ)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())


def readiness(fleet: FleetSnapshot) -> tuple[bool, str]:
    """Whether every wanted model is served, and which is not."""
    waiting = [
        model.name for model in fleet.models.values() if model.replicas_wanted > 0 and model.name not in fleet.ready
    ]
    return not waiting, f"not served yet: {', '.join(sorted(waiting))}" if waiting else ""


def _add_status(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/status", tags=["status"])
    @allow(Scope.READ)
    async def status() -> schemas.StatusOut:
        """Everything at one moment."""
        fleet, now_s = parts.inventory.snapshot(), parts.clock.now_s()
        outstanding = parts.gateway.seats.outstanding
        return schemas.StatusOut(
            version=__version__,
            url=parts.url,
            pid=parts.pid,
            started_at_s=parts.started_at_s,
            uptime_s=now_s - parts.started_at_s,
            ready=readiness(fleet)[0],
            is_simulated=fleet.is_simulated,
            devices=_devices(parts),
            models=[views.model(model, fleet) for model in fleet.models.values()],
            replicas=[views.replica(report, outstanding) for report in parts.node.replicas()],
            loops=[
                schemas.LoopOut(name=loop.name, state=loop.state, restarts=loop.restarts, last_error=loop.last_error)
                for loop in parts.supervisor.health()
            ],
            calls=schemas.CallsOut(outstanding=sum(outstanding.values()), queued=parts.gateway.seats.waiting_total()),
        )

    @app.get("/api/devices", tags=["status"])
    @allow(Scope.READ)
    async def devices() -> schemas.DevicesOut:
        """Devices, their last readings, and who holds their memory."""
        return schemas.DevicesOut(devices=_devices(parts))

    @app.get("/api/placement", tags=["status"])
    @allow(Scope.READ)
    async def placement() -> schemas.PlacementOut:
        """The last placement plan, with a refusal and its reason per device."""
        return views.placement(parts.reconciler.explain(), parts.clock.now_s())

    @app.get("/api/doctor", tags=["status"])
    @allow(Scope.READ)
    async def doctor() -> schemas.DoctorOut:
        """Look at everything that can be wrong, and say how to mend it."""
        return schemas.DoctorOut(checks=await parts.doctor.check())

    @app.post("/api/stop", tags=["status"], status_code=202)
    @allow(Scope.ADMIN)
    async def stop() -> dict[str, str]:
        """Stop the server in order."""
        asyncio.get_running_loop().call_later(0.05, parts.stop)  # after this answer is out
        return {"status": "stopping"}


def _devices(parts: Parts) -> list[schemas.DeviceOut]:
    pids = {parts.pid, *(report.pid for report in parts.node.replicas() if report.pid is not None)}
    now_s = parts.clock.now_s()
    return [views.device(view, now_s, pids) for view in parts.inventory.snapshot().devices]


def _add_models(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/models", tags=["models"])
    @allow(Scope.READ)
    async def models() -> schemas.ModelsOut:
        """The catalogue, and whether each model is served."""
        fleet = parts.inventory.snapshot()
        return schemas.ModelsOut(models=[views.model(model, fleet) for model in fleet.models.values()])

    @app.post("/api/models", tags=["models"], status_code=201)
    @allow(Scope.ADMIN)
    async def add_model(wanted: schemas.ModelIn) -> schemas.ModelOut:
        """Add a model; it is placed and loaded at once."""
        model = await _add(parts.catalog, wanted)
        return views.model(model, parts.inventory.snapshot())

    @app.delete("/api/models/{name}", tags=["models"], status_code=204, response_class=Response)
    @allow(Scope.ADMIN)
    async def remove_model(name: str) -> None:
        """Remove a model from the catalogue; its replicas finish their calls and stop. Files stay."""
        await parts.catalog.remove(name)

    @app.get("/v1/models/{name}", tags=["models"])
    @allow(Scope.INFER)
    async def listed_model(name: str, request: Request) -> dict[str, object]:
        """One model as OpenAI's API shows it."""
        fleet, allowed = parts.inventory.snapshot(), _principal(request).models
        known = {model.name: model for model in fleet.models.values() if not allowed or model.name in allowed}
        if ModelName(name) not in known:
            raise model_not_found(name, known)
        return entry_of(known[ModelName(name)], fleet)

    @app.get("/api/models/{name}/routes", tags=["models"])
    @allow(Scope.READ)
    async def model_routes(name: str) -> schemas.LinesOut:
        """Where a chat call would go now, and why not elsewhere."""
        fleet = parts.inventory.snapshot()
        if ModelName(name) not in fleet.models:
            raise ModelNotFound(f"There is no model named {name[:200]!r}.")
        return schemas.LinesOut(
            lines=list(explain(ModelName(name), Ability.CHAT, fleet, parts.gateway.seats.outstanding))
        )

    @app.post("/api/fit", tags=["models"])
    @allow(Scope.READ)
    async def fits(wanted: schemas.FitIn) -> schemas.FitOut:
        """Whether a model file would fit, per device, before it is loaded."""
        shape = (await asyncio.to_thread(read_header, Path(wanted.path))).shape
        verdicts = fit(
            shape,
            parts.inventory.snapshot().devices,
            wanted.context_tokens,
            wanted.slots,
            parts.configuration.settings.fleet.reserve_bytes,
        )
        return schemas.FitOut(
            model=schemas.FitModelOut(
                architecture=shape.architecture,
                quantisation=shape.quantisation,
                parameters=shape.parameters,
                layers=shape.layers,
                context_length_trained=shape.context_length_trained,
            ),
            footprint=views.footprint(verdicts[0].footprint),
            devices=[views.device_fit(verdict) for verdict in verdicts],
        )


def _add_replicas(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/replicas", tags=["replicas"])
    @allow(Scope.READ)
    async def replicas() -> schemas.ReplicasOut:
        """Replicas as they were last seen."""
        outstanding = parts.gateway.seats.outstanding
        return schemas.ReplicasOut(replicas=[views.replica(r, outstanding) for r in parts.node.replicas()])

    @app.get("/api/replicas/{replica_id}/log", tags=["replicas"])
    @allow(Scope.READ)
    async def replica_log(
        replica_id: str, lines: Annotated[int, Query(ge=1, le=LOG_LINES_MAX)] = 200
    ) -> schemas.LinesOut:
        """The last lines that a replica's engine wrote."""
        tail = await asyncio.to_thread(parts.node.log_tail, ReplicaId(replica_id), lines)
        return schemas.LinesOut(lines=tail)

    @app.post("/api/replicas/{replica_id}/restart", tags=["replicas"], status_code=202)
    @allow(Scope.ADMIN)
    async def restart_replica(replica_id: str) -> dict[str, str]:
        """Stop a replica after its calls; another takes its place."""
        await parts.reconciler.restart(ReplicaId(replica_id))
        return {"status": "restarting"}


def _add_keys(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/keys", tags=["keys"])
    @allow(Scope.ADMIN)
    async def keys() -> schemas.KeysOut:
        """All keys without their text."""
        return schemas.KeysOut(keys=[views.key(record) for record in await parts.keys.records()])

    @app.post("/api/keys", tags=["keys"], status_code=201)
    @allow(Scope.ADMIN)
    async def create_key(wanted: schemas.KeyIn, request: Request) -> schemas.NewKeyOut:
        """Make a key. Its text is in this answer and nowhere else."""
        record, text = await parts.keys.create(
            wanted.name,
            wanted.scopes,
            models=wanted.models,
            expires_in_s=wanted.expires_in_s,
            created_by=_asker(request),
        )
        return schemas.NewKeyOut(**views.key(record).model_dump(), key=text)

    @app.delete("/api/keys/{key_id}", tags=["keys"], status_code=204, response_class=Response)
    @allow(Scope.ADMIN)
    async def revoke_key(key_id: str, request: Request) -> None:
        """End a key at once."""
        await parts.keys.revoke(key_id, revoked_by=_asker(request))


def _asker(request: Request) -> str:
    return _principal(request).key_id


def _principal(request: Request) -> Principal:
    principal = request.scope[PRINCIPAL]
    assert isinstance(principal, Principal), "the route let in only a valid key"
    return principal


def _add_records(app: FastAPI, parts: Parts) -> None:
    @app.get("/api/config", tags=["records"])
    @allow(Scope.READ)
    async def config() -> schemas.ConfigOut:
        """Every setting and where its value came from. Secrets are masked."""
        return schemas.ConfigOut(values=[schemas.ValueOut.model_validate(v) for v in parts.configuration.show()])

    @app.get("/api/journal", tags=["records"])
    @allow(Scope.READ)
    async def journal(
        after: Annotated[int, Query(ge=0, le=POSITION_MAX)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        kind: Annotated[str | None, Query(max_length=100)] = None,
    ) -> schemas.JournalOut:
        """What happened, oldest first, after position ``after``."""
        entries = await parts.journal.entries(after=after, limit=limit, kind=kind)
        return schemas.JournalOut(
            entries=[
                schemas.EntryOut(
                    position=entry.position,
                    kind=entry.kind,
                    subject=entry.subject,
                    at_s=entry.at_s,
                    data=dict(entry.data),
                    hash=entry.hash,
                )
                for entry in entries
            ]
        )

    @app.get("/api/usage", tags=["records"])
    @allow(Scope.READ)
    async def usage(since_s: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0) -> schemas.UsageOut:
        """Calls and tokens since a time, by model and key. Up to a second behind."""
        totals = await parts.usage.totals(since_s)
        return schemas.UsageOut(
            since_s=since_s,
            rows=[
                schemas.UsageRowOut(
                    model=total.model,
                    key_id=total.key_id,
                    calls=total.calls,
                    is_simulated=total.is_simulated,
                    prompt_tokens=total.prompt_tokens,
                    completion_tokens=total.completion_tokens,
                )
                for total in totals
            ],
        )

    @app.get("/api/logs", tags=["records"])
    @allow(Scope.ADMIN)
    async def logs(lines: Annotated[int, Query(ge=1, le=LOG_LINES_MAX)] = 200) -> schemas.LinesOut:
        """The last lines of the server's own log."""
        return schemas.LinesOut(lines=await asyncio.to_thread(read_tail, parts.log_file, lines))


def _set_gauges(parts: Parts) -> None:
    """Bring the gauges to the present; counters are always there."""
    fleet, metrics, seats = parts.inventory.snapshot(), parts.metrics, parts.gateway.seats
    metrics.replicas.clear()
    metrics.outstanding_calls.clear()
    metrics.queue_calls.clear()
    for model in fleet.models:
        metrics.queue_calls.labels(model).set(seats.waiting(model))
        metrics.outstanding_calls.labels(model).set(0)
    for replica in fleet.replicas:
        metrics.replicas.labels(replica.model, replica.state).inc()
        metrics.outstanding_calls.labels(replica.model).inc(seats.outstanding.get(replica.id, 0))
    for view in fleet.devices:
        metrics.device_memory_bytes_total.labels(view.device.id).set(view.device.memory_bytes_total)
        if view.reading is None:
            continue
        metrics.device_memory_bytes_used.labels(view.device.id).set(view.reading.memory_bytes_used)
        for gauge, value in (
            (metrics.device_utilisation, view.reading.utilisation),
            (metrics.device_temperature_c, view.reading.temperature_c),
            (metrics.device_power_w, view.reading.power_w),
        ):
            if value is not None:
                gauge.labels(view.device.id).set(value)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, FleetmindError)
    if isinstance(error, InternalError):
        _log.error("a request was refused", path=request.url.path, error=error.message)
    headers = {name.decode(): value.decode() for name, value in headers_of(error)}
    return Response(body_of(error), status_of(error), headers)


async def _refuse_values(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _refuse(request, InvalidRequest("The body is not JSON.", hint="Send one JSON object."))
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    message = first["msg"].removeprefix("Value error, ")
    problem = InvalidRequest(
        f"{where or 'body'}: {message}.", hint="GET /api/openapi.json has the shape.", param=where or None
    )
    return await _refuse(request, problem)


async def _refuse_plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = InvalidRequest(f"{error.detail}.", hint="GET /api/openapi.json lists what is there.")
    headers = {name.decode(): value.decode() for name, value in headers_of(problem)} | dict(error.headers or {})
    return Response(body_of(problem), error.status_code, headers)


async def _refuse_ours(request: Request, _: Exception) -> Response:
    return await _refuse(request, InternalError("Something went wrong here.", hint="`fleetmind logs` shows what."))


async def _add(catalog: Catalog, wanted: schemas.ModelIn) -> Model:
    """Add what ``wanted`` describes. Raises InvalidRequest where a field that its source needs is missing."""
    if wanted.options and wanted.source not in ("file", "fake"):
        raise InvalidRequest(f"A model of source {wanted.source!r} has no options.", param="options")
    match wanted.source:
        case "packaged":
            return await catalog.add_packaged(context_tokens=wanted.context_tokens, slots=wanted.slots)
        case "file":
            return await catalog.add_file(
                Path(_needed(wanted.path, "path", wanted.source)),
                name=wanted.name,
                context_tokens=wanted.context_tokens,
                slots=wanted.slots,
                replicas=wanted.replicas,
                options=wanted.options,
            )
        case "remote":
            name = _needed(wanted.name, "name", wanted.source)
            return await catalog.add_remote(
                name,
                _needed(wanted.url, "url", wanted.source),
                remote_model=wanted.remote_model,
                key_env=wanted.key_env,
                context_tokens=wanted.context_tokens,
                slots=wanted.slots,
            )
        case "fake":
            return await catalog.add_fake(
                _needed(wanted.name, "name", wanted.source),
                wanted.options,
                context_tokens=wanted.context_tokens,
                slots=wanted.slots,
                replicas=wanted.replicas,
            )


def _needed(value: str | None, param: str, source: str) -> str:
    if not value:
        raise InvalidRequest(f"A model of source {source!r} needs {param}.", param=param)
    return value
