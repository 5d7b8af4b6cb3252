"""The only way a token is produced.

``Gateway.dispatch`` admits a call, routes it and attempts it until the first piece of the answer is there; the Answer
it returns gives the rest and is settled when it is closed. One function for whole replies and for streams. It never
speaks HTTP to a client, never decides where models live, and writes nothing to the database while a client waits:
usage goes through ``accounting`` in batches.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fleetmind.core.clock import Clock, monotonic_ns, secret_token
from fleetmind.core.errors import (
    CallerError,
    CapacityError,
    EngineError,
    EngineFailed,
    EngineRefused,
    FleetmindError,
    StreamBroken,
)
from fleetmind.core.telemetry import Spans
from fleetmind.core.types import CallId, ReplicaId
from fleetmind.fleet.snapshot import FleetSnapshot, ReplicaView
from fleetmind.gateway.accounting import Accounting
from fleetmind.gateway.calls import (
    ABILITY_NEEDED,
    Call,
    Served,
    Usage,
    check_fits_context,
    engine_body,
    model_not_found,
    usage_of_reply,
)
from fleetmind.gateway.limits import QueuePolicy
from fleetmind.gateway.seats import Seats
from fleetmind.gateway.streaming import EventStream
from fleetmind.gateway.upstream import RETRYABLE, EngineStream, Patience, Upstream
from fleetmind.store.usage import UsageRow

_NS = 1e-9


@dataclass(slots=True)
class _Ticket:
    """What is known of a call so far; settled once, whatever happens. Times are the monotonic clock, 0 for not yet."""

    call: Call
    replica: ReplicaView | None = None
    is_seated: bool = False
    seated_ns: int = 0
    first_piece_ns: int = 0
    usage: Usage | None = None
    events: int = 0
    status: str = "aborted"


class Gateway:
    """All calls to all models. One event loop only."""

    def __init__(
        self,
        *,
        snapshot: Callable[[], FleetSnapshot],
        verify: Callable[[ReplicaId, str], Awaitable[None]],
        accounting: Accounting,
        clock: Clock,
        spans: Spans,
        queue: QueuePolicy,
        patience: Patience,
        retries_max: int,
    ) -> None:
        """``verify`` makes the fleet look at a replica that failed a call, and returns when it has."""
        self._snapshot = snapshot
        self._verify = verify
        self.accounting = accounting
        self._clock = clock
        self.spans = spans
        self._retries_max = retries_max
        self._upstream = Upstream(patience)
        self._serial = itertools.count()
        self._call_prefix = f"call-{secret_token(5).hex()}"
        self.seats = Seats(snapshot, queue)

    async def close(self) -> None:
        """Close the connections to the engines."""
        await self._upstream.close()

    def next_call_id(self) -> CallId:
        """An id that no other call has, in this life of the server or another."""
        return CallId(f"{self._call_prefix}-{next(self._serial):x}")

    def fleet_changed(self, snapshot: FleetSnapshot) -> None:
        """The fleet's replicas or models changed."""
        self.seats.fleet_changed()
        self._upstream.forget(frozenset(replica.id for replica in snapshot.replicas))

    async def dispatch(self, call: Call) -> "Answer":
        """The answer to ``call``, its first piece there; to be closed.

        In order:
          1. admit    a known model, a line that isn't full
          2. route    the replica with the least share of its slots taken; wait for one if need be
          3. attempt  ask the engine; a failure before the first piece is repeated at most ``retries_max`` times
          4. settle   usage, metrics and the slot, whatever happened: here if it failed, else when it is closed

        Raises a FleetmindError; then nothing was sent.
        """
        models = self._snapshot().models
        if call.model not in models:
            raise model_not_found(call.model, models)
        ticket = _Ticket(call)
        tried: set[ReplicaId] = set()
        try:
            while True:
                ticket.replica = await self.seats.take(call.model, ABILITY_NEEDED[call.kind], tried)
                ticket.is_seated, ticket.seated_ns = True, monotonic_ns()
                try:
                    check_fits_context(call, ticket.replica.context_tokens)
                    return await self._attempt(ticket, ticket.replica)
                except (EngineFailed, EngineRefused) as error:
                    is_engines_fault = isinstance(error, EngineFailed) or error.status in RETRYABLE
                    if not is_engines_fault or len(tried) >= self._retries_max:
                        raise
                    failure = error.message
                self._unseat(ticket)
                tried.add(ticket.replica.id)
                await self._verify(ticket.replica.id, failure)
        except BaseException as error:
            ticket.status = _status(error)
            self.settle(ticket)
            raise

    async def _attempt(self, ticket: _Ticket, replica: ReplicaView) -> "Answer":
        """Ask one replica once, up to the first piece. Raises EngineFailed, EngineRefused."""
        call = ticket.call
        body = engine_body(call, replica.remote_model)
        served = Served(call.model, replica.id, (ticket.seated_ns - call.received_ns) * _NS, replica.is_simulated)
        if not call.is_stream:
            data = await self._upstream.reply(replica, call.kind, body, call.hops)
            try:
                ticket.usage = usage_of_reply(data)
            except ValueError as error:
                raise EngineFailed(f"{replica.id} answered with something that is not JSON: {error}") from None
            ticket.first_piece_ns = monotonic_ns()
            return Answer(self, ticket, served, data, None)
        stream = await self._upstream.stream(replica, call.kind, body, call.hops)
        try:
            answer = Answer(self, ticket, served, b"", stream)
            try:
                answer.first = await answer.read()
            except StreamBroken as error:
                raise EngineFailed(error.message) from None
            ticket.first_piece_ns = monotonic_ns()
            return answer
        except BaseException:
            stream.close()
            raise

    async def stream_broke(self, ticket: _Ticket, fault: StreamBroken) -> None:
        """A stream broke after its first piece: count it, and have the fleet look at the replica."""
        ticket.status = _status(fault)
        assert ticket.replica is not None, "a stream has a replica"
        await self._verify(ticket.replica.id, fault.message)

    def _unseat(self, ticket: _Ticket) -> None:
        if ticket.is_seated and ticket.replica is not None:
            ticket.is_seated = False
            took_s = (monotonic_ns() - ticket.seated_ns) * _NS if ticket.first_piece_ns else None
            self.seats.leave(ticket.replica, took_s)

    def settle(self, ticket: _Ticket) -> None:
        """Free the slot and count what the call used; the database hears of it later, in a batch."""
        self._unseat(ticket)
        call, now_ns, first_ns = ticket.call, monotonic_ns(), ticket.first_piece_ns
        usage = ticket.usage or Usage(0, ticket.events)
        self.accounting.settle(
            UsageRow(
                call_id=call.id,
                key_id=call.key_id,
                model=call.model,
                replica_id=ticket.replica.id if ticket.replica else "",
                kind=call.kind.value,
                status=ticket.status,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                queue_s=((ticket.seated_ns or now_ns) - call.received_ns) * _NS,
                ttft_s=(first_ns - call.received_ns) * _NS if first_ns else None,
                duration_s=(now_ns - call.received_ns) * _NS,
                at_s=self._clock.now_s(),
                is_simulated=bool(ticket.replica and ticket.replica.is_simulated),
            )
        )


class Answer:
    """An answer under way: ``first`` is its first piece, iterating gives the others, ``with`` closes it.

    Pieces are whole server-sent events of a stream, or the one whole body of a reply that isn't one. ``is_done`` means
    that nothing for the client follows the last piece; the engine may still close its side.
    """

    __slots__ = ("_events", "_gateway", "_stream", "_ticket", "first", "served")

    def __init__(
        self, gateway: Gateway, ticket: _Ticket, served: Served, first: bytes, stream: EngineStream | None
    ) -> None:
        self._gateway = gateway
        self._ticket = ticket
        self._stream = stream
        self._events = EventStream(hides_usage=not ticket.call.wants_usage) if stream else None
        self.served = served
        self.first = first

    @property
    def is_done(self) -> bool:
        return self._events is None or self._events.is_done

    async def read(self) -> bytes:
        """The next piece, empty at the end. Raises StreamBroken."""
        events, stream, ticket = self._events, self._stream, self._ticket
        if events is None or stream is None:
            return b""
        reason: str | None = None
        while events.fault is None:  # also past [DONE], to its end: only then the connection can be used again
            try:
                piece = await stream.read()
            except EngineFailed as error:
                reason, piece = error.message, b""
            if not piece:
                break
            data = events.feed(piece)
            ticket.usage, ticket.events = events.usage, events.events
            if data:
                return data
        fault = events.close(reason)
        if fault is not None:
            raise fault
        return b""

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await self.read()
        except StreamBroken as fault:
            await self._gateway.stream_broke(self._ticket, fault)
            raise
        if not piece:
            raise StopAsyncIteration
        return piece

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        if self.is_done and self._ticket.status == _ABORTED:
            self._ticket.status = "ok"
        self._gateway.settle(self._ticket)


_ABORTED = "aborted"


def _status(error: BaseException) -> str:
    """How the end of a call is counted."""
    if isinstance(error, EngineRefused) and error.status < 500:
        return "refused"
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return _ABORTED if isinstance(error, asyncio.CancelledError) else "error"


_STATUSES: tuple[tuple[type[FleetmindError], str], ...] = (
    (CallerError, "refused"),
    (CapacityError, "no_capacity"),
    (EngineError, "engine_error"),
)
