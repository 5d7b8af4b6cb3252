"""The OpenAI-compatible surface: bodies in, answers out, as they come.

The hot path: no framework between the socket and ``Gateway.dispatch``, and an answer's bytes are those of the engine.
Decides nothing; what a client may ask is checked in ``gateway.calls``, who may ask in ``gate``.
"""

import asyncio
from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from fleetmind.api.auth import Principal
from fleetmind.api.auth import Scope as Right
from fleetmind.api.bodies import read_body
from fleetmind.api.problems import body_of
from fleetmind.api.routes import PRINCIPAL, DirectRoute
from fleetmind.core.clock import monotonic_ns
from fleetmind.core.config import ServerSettings
from fleetmind.core.errors import CapacityError, FleetmindError, Forbidden, InvalidRequest, StreamBroken
from fleetmind.fleet.snapshot import FleetSnapshot, Model
from fleetmind.gateway import upstream
from fleetmind.gateway.calls import Call, CallKind, Served, parse_call
from fleetmind.gateway.dispatch import Gateway
from fleetmind.gateway.streaming import error_event

WATCH_AFTER_S = 0.05
"""A call is watched for a client that goes away only after this long: most are over by then, and a watch costs."""

STOPPING_RETRY_S = 5.0
HOPS_MAX = 4
HOPS_HEADER = upstream.HOPS_HEADER.lower().encode()

_JSON = (b"content-type", b"application/json")
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_encode = msgspec.json.Encoder().encode


def routes(gateway: Gateway, snapshot: Callable[[], FleetSnapshot], settings: ServerSettings) -> list[DirectRoute]:
    """The routes below ``/v1``."""
    calls = [
        DirectRoute("POST", f"/v1/{kind.value}", _answerer(kind, gateway, settings), Right.INFER) for kind in CallKind
    ]
    return [*calls, DirectRoute("GET", "/v1/models", _models_lister(snapshot), Right.INFER)]


def _answerer(kind: CallKind, gateway: Gateway, settings: ServerSettings) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal = scope[PRINCIPAL]
        received_ns = monotonic_ns()
        try:
            body = await read_body(scope, receive, bytes_max=settings.body_bytes_max)
        except ConnectionResetError:
            return
        hops = _hops_of(scope)
        call = parse_call(
            kind,
            body,
            call_id=gateway.next_call_id(),
            key_id=principal.key_id,
            received_ns=received_ns,
            hops=hops,
            messages_max=settings.messages_max,
        )
        if principal.models and call.model not in principal.models:
            raise Forbidden(f"This key may not use {call.model[:200]!r}.", hint="Make a key for that model.")
        with _ClientWatch(receive) as watch:
            try:
                await _pass_on(gateway, call, send)
            except asyncio.CancelledError:
                if not watch.client_left:  # uvicorn cancels what has not ended when the server stops
                    raise CapacityError(
                        "The server is stopping.", retry_after_s=STOPPING_RETRY_S, hint="Ask again soon."
                    ) from None

    return answer


async def _pass_on(gateway: Gateway, call: Call, send: Send) -> None:
    """Send the answer's pieces as they come. An error before the first is raised, one after it ends the stream."""
    with gateway.spans.span("call", model=call.model, call=call.id), await gateway.dispatch(call) as answer:
        if not call.is_stream:
            headers = [_JSON, (b"content-length", b"%d" % len(answer.first)), *_served(call, answer.served)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer.first})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [*_EVENTS, *_served(call, answer.served)]})
        is_ended = answer.is_done
        await send({"type": "http.response.body", "body": answer.first, "more_body": not is_ended})
        try:
            async for piece in answer:
                is_ended = answer.is_done
                await send({"type": "http.response.body", "body": piece, "more_body": not is_ended})
            last = b""
        except FleetmindError as error:
            last = error_event(body_of(error))
        except asyncio.CancelledError:  # by a server that stops, or because the client left, who won't see it
            last = error_event(body_of(_stopping()))
        if not is_ended:
            await send({"type": "http.response.body", "body": last})


def _stopping() -> StreamBroken:
    return StreamBroken(
        "The server is stopping, and this call did not end in time.",
        hint="The answer so far is incomplete; ask again, or raise server.stop_s_max.",
    )


def _hops_of(scope: Scope) -> int:
    """How many Fleetmind servers the call has passed through. Raises InvalidRequest for one that goes in circles."""
    for name, value in scope["headers"]:
        if name == HOPS_HEADER:
            hops = int(value) if value.isdigit() and len(value) <= 3 else HOPS_MAX
            if hops >= HOPS_MAX:
                raise InvalidRequest(
                    f"This call has passed through {hops} Fleetmind servers.",
                    hint="A remote model seems to point back here: see the URLs in `fleetmind models ls --json`.",
                )
            return hops
    return 0


def _served(call: Call, served: Served) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"x-fleetmind-call", call.id.encode()),
        (b"x-fleetmind-model", served.model.encode()),
        (b"x-fleetmind-replica", served.replica.encode()),
        (b"x-fleetmind-queue-ms", b"%.1f" % (served.queue_s * 1000)),
    ]
    if served.is_simulated:
        headers.append((b"x-fleetmind-simulated", b"true"))
    return headers


class _ClientWatch:
    """Cancels the call it stands around as soon as its client is gone, so that the engine's slot is free at once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task = asyncio.current_task()
        self._watch: asyncio.Task[None] | None = None
        self.client_left = False

    def __enter__(self) -> "_ClientWatch":
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()

    def _begin(self) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        assert self._task is not None, "a call is answered inside a task"
        self._task.cancel()


def entry_of(model: Model, fleet: FleetSnapshot) -> dict[str, object]:
    """A model as OpenAI's API lists it, and whether it is served now."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.added_at_s),
        "owned_by": "fleetmind",
        "ready": model.name in fleet.ready,
    }


def _models_lister(snapshot: Callable[[], FleetSnapshot]) -> ASGIApp:
    async def list_models(scope: Scope, receive: Receive, send: Send) -> None:
        fleet = snapshot()
        principal: Principal = scope[PRINCIPAL]
        models = [
            entry_of(model, fleet)
            for model in sorted(fleet.models.values(), key=lambda model: model.name)
            if not principal.models or model.name in principal.models
        ]
        body = _encode({"object": "list", "data": models})
        headers = [_JSON, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return list_models
