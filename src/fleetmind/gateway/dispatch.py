"""The only way a token is produced.

``Gateway.dispatch`` admits a call, routes it, attempts it, and settles what it used; one function for a whole reply
and for a stream. It never speaks HTTP to a client, never decides where models live, and writes nothing to the database
while a client waits: usage goes through ``accounting`` in batches.
"""

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Set
from contextlib import aclosing
from dataclasses import dataclass

from fleetmind.core.clock import Clock, monotonic_ns, secret_token
from fleetmind.core.errors import CallerError, CapacityError, EngineError, EngineFailed, EngineRefused, FleetmindError
from fleetmind.core.telemetry import Spans
from fleetmind.core.types import CallId, ReplicaId
from fleetmind.fleet.snapshot import FleetSnapshot, ReplicaView
from fleetmind.gateway.accounting import Accounting
from fleetmind.gateway.calls import (
    ABILITY_NEEDED,
    Call,
    Chunk,
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
from fleetmind.gateway.upstream import RETRYABLE, Patience, Upstream
from fleetmind.store.usage import UsageRow

_NS = 1e-9


@dataclass(slots=True)
class _Ticket:
    """What is known of a call so far; settled once, whatever happens."""

    call: Call
    replica: ReplicaView | None = None
    seated_ns: int = 0
    first_token_ns: int = 0
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
        self._spans = spans
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

    async def dispatch(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Answer ``call`` piece by piece.

        In order:
          1. admit    a known model, a line that isn't full
          2. route    the replica with the least share of its slots taken; wait for one if need be
          3. attempt  ask the engine; a failure before the first piece is repeated at most ``retries_max`` times
          4. settle   usage, metrics and the slot, whatever happened

        Raises a FleetmindError: before the first piece nothing was sent; after it the answer is incomplete.
        """
        models = self._snapshot().models
        if call.model not in models:
            raise model_not_found(call.model, models)
        ticket = _Ticket(call)
        try:
            with self._spans.span("gateway.dispatch", model=call.model, call=call.id):
                tried: set[ReplicaId] = set()
                while True:
                    replica = await self.seats.take(call.model, ABILITY_NEEDED[call.kind], tried)
                    ticket.replica, ticket.seated_ns = replica, monotonic_ns()
                    try:
                        check_fits_context(call, replica.context_tokens)
                        if call.is_stream:
                            async with aclosing(self._stream(call, ticket, replica)) as chunks:
                                async for chunk in chunks:
                                    yield chunk
                        else:
                            yield await self._reply(call, ticket, replica)
                        break
                    except (EngineFailed, EngineRefused) as error:
                        if not self._may_retry(error, ticket, tried):
                            raise
                        failure = error.message
                    finally:
                        self.seats.leave(replica, _seconds(ticket.seated_ns) if ticket.first_token_ns else None)
                    tried.add(replica.id)
                    await self._verify(replica.id, failure)
            ticket.status = "ok"
        except FleetmindError as error:
            ticket.status = _status(error)
            raise
        finally:
            self._settle(ticket)

    def _may_retry(self, error: EngineFailed | EngineRefused, ticket: _Ticket, tried: Set[ReplicaId]) -> bool:
        """Whether a failed attempt may be repeated: only while the client has seen nothing, and not where the engine
        refused the call itself."""
        is_engines_fault = isinstance(error, EngineFailed) or error.status in RETRYABLE
        return is_engines_fault and not ticket.first_token_ns and len(tried) < self._retries_max

    async def _reply(self, call: Call, ticket: _Ticket, replica: ReplicaView) -> Chunk:
        """Ask one replica once for a whole answer."""
        data = await self._upstream.reply(replica, call.kind, engine_body(call, replica.remote_model))
        try:
            ticket.usage = usage_of_reply(data)
        except ValueError as error:
            raise EngineFailed(f"{replica.id} answered with something that is not JSON: {error}") from None
        ticket.first_token_ns = monotonic_ns()
        return Chunk(data, _served(call, ticket, replica), is_last=True)

    async def _stream(self, call: Call, ticket: _Ticket, replica: ReplicaView) -> AsyncGenerator[Chunk, None]:
        """Ask one replica once for a stream."""
        body, served = engine_body(call, replica.remote_model), _served(call, ticket, replica)
        events = EventStream(hides_usage=not call.wants_usage)
        reason: str | None = None
        async with aclosing(self._upstream.stream(replica, call.kind, body)) as pieces:
            try:
                async for piece in pieces:  # also past [DONE], to its end: only then the connection can be used again
                    data = events.feed(piece)
                    ticket.usage, ticket.events = events.usage, events.events
                    if data:
                        ticket.first_token_ns = ticket.first_token_ns or monotonic_ns()
                        yield Chunk(data, served, events.is_done)
                    if events.fault is not None:
                        break
            except EngineFailed as error:
                reason = error.message
        fault = events.close(reason)
        if fault is None:
            return
        if not ticket.first_token_ns:
            raise EngineFailed(fault.message)
        await self._verify(replica.id, fault.message)
        raise fault

    def _settle(self, ticket: _Ticket) -> None:
        """Count what a call used; the database hears of it later, in a batch."""
        call, now_ns = ticket.call, monotonic_ns()
        usage = ticket.usage or Usage(0, ticket.events)
        seated_ns = ticket.seated_ns or now_ns
        first_ns = ticket.first_token_ns
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
                queue_s=(seated_ns - call.received_ns) * _NS,
                ttft_s=(first_ns - call.received_ns) * _NS if first_ns else None,
                duration_s=(now_ns - call.received_ns) * _NS,
                at_s=self._clock.now_s(),
                is_simulated=bool(ticket.replica and ticket.replica.is_simulated),
            )
        )


def _served(call: Call, ticket: _Ticket, replica: ReplicaView) -> Served:
    return Served(call.model, replica.id, (ticket.seated_ns - call.received_ns) * _NS, replica.is_simulated)


def _seconds(since_ns: int) -> float:
    return (monotonic_ns() - since_ns) * _NS


def _status(error: FleetmindError) -> str:
    """How the end of a call is counted."""
    if isinstance(error, CallerError):
        return "refused"
    if isinstance(error, CapacityError):
        return "no_capacity"
    if isinstance(error, EngineRefused) and error.status < 500:
        return "refused"
    if isinstance(error, EngineError):
        return "engine_error"
    return "error"
