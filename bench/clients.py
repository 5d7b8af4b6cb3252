"""Streaming clients in a process of their own: how a benchmark asks many streams at once and sees each event arrive.

Each client asks one question after another, each on a connection of its own, as some engines hang up after a stream.
Everything received is kept with its time,
and looked at only after the last byte, so that looking does not slow what is measured. An answer counts only if it was
whole: status 200, events that are JSON, as many tokens as asked for in the usage, and the terminator.

Run as ``python -m bench.clients``: reads a ``Plan`` as JSON on standard input, prints an ``Outcome`` as JSON.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from bench.processes import NotMeasured
from bench.results import percentile

ERRORS_KEPT = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask. Client i asks ``requests`` times with ``bodies[i % len(bodies)]``; starts spread over ``ramp_s``."""

    port: int
    path: str
    key: str
    bodies: tuple[str, ...]
    clients: int
    requests: int
    tokens: int
    ramp_s: float = 0.0
    silence_s_max: float = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all clients saw together. Times are seconds; a gap is between two arrivals of data within one answer."""

    answers: int
    errors: int
    first_errors: tuple[str, ...]
    tokens: int
    duration_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    gap_max_s: float
    cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.duration_s


@dataclass(slots=True)
class Exchange:
    """One request and everything that came back, with the time of each piece."""

    asked_at_s: float
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    fault: str | None = None

    def gaps_s(self) -> list[float]:
        """Seconds between pieces."""
        times = [at_s for at_s, _ in self.arrivals]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def ttft_s(self) -> float | None:
        """Seconds until the first piece that held an event."""
        return next((at_s - self.asked_at_s for at_s, data in self.arrivals if b"data: " in data), None)


def check(exchange: Exchange, tokens: int) -> str | None:
    """What is wrong with an answer that was to hold ``tokens`` tokens; None if nothing is."""
    head, _, body = b"".join(data for _, data in exchange.arrivals).partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if head and status != [b"200"]:
        return f"status {b''.join(status).decode(errors='replace')}: {body[:400].decode(errors='replace')}"
    if exchange.fault is not None:
        return exchange.fault
    if not head:
        return "no answer"
    events = dechunked(body).decode(errors="replace").split("\n\n")
    lines = [
        line.removeprefix("data: ") for event in events for line in event.splitlines() if line.startswith("data: ")
    ]
    if not lines or lines[-1] != "[DONE]":
        return f"no [DONE] at the end: {lines[-1:]}"
    counted, text = None, ""
    try:
        for line in lines[:-1]:
            chunk = json.loads(line)
            if "error" in chunk:
                return f"an error event: {line[:200]}"
            counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
            text += "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices") or [])
    except (ValueError, LookupError, AttributeError, TypeError) as problem:
        return f"an event is not what it should be: {problem!r}"
    if counted != tokens:
        return f"usage says {counted} tokens where {tokens} were asked for"
    return None if text else "no text"


def dechunked(body: bytes) -> bytes:
    """The content of a chunked body. Raises ValueError when it is cut short or malformed."""
    parts: list[bytes] = []
    rest = body
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if length == 0:
            return b"".join(parts)
        if len(rest) < length + 2:
            raise ValueError("a chunk is cut short")
        parts.append(rest[:length])
        rest = rest[length + 2 :]


class Client(asyncio.Protocol):
    """One connection: sends the request, keeps what comes, notices the end of the chunked body."""

    def __init__(self, request: bytes, asked_at_s: float) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._exchange = Exchange(asked_at_s)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's by behaviour only, not by type.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._exchange.arrivals.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was closed: {exc}; the last bytes: {self._tail!r}")

    def _end(self, fault: str | None = None) -> None:
        if not self._ended.done():
            self._exchange.fault = fault
            self._ended.set_result(None)

    async def answer(self, silence_s_max: float) -> Exchange:
        """Return when the answer is whole, broken, or was silent for too long."""
        seen = -1
        while not self._ended.done():
            await asyncio.wait({self._ended}, timeout=silence_s_max)
            if len(self._exchange.arrivals) == seen:
                self._end(f"silent for {silence_s_max:g} s; the last bytes: {self._tail!r}")
            seen = len(self._exchange.arrivals)
        return self._exchange

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def request_bytes(plan: Plan, body: str) -> bytes:
    """The HTTP request, ready to be sent."""
    data = body.encode()
    head = (
        f"POST {plan.path} HTTP/1.1\r\nHost: 127.0.0.1:{plan.port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {plan.key}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def ask(plan: Plan, request: bytes) -> Exchange:
    """One question on a new connection. The time of connecting counts to the first token."""
    began_s = time.perf_counter()
    try:
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: Client(request, began_s), "127.0.0.1", plan.port
        )
    except OSError as problem:
        return Exchange(began_s, fault=f"no connection: {problem}")
    try:
        return await client.answer(plan.silence_s_max)
    finally:
        client.close()


async def run(plan: Plan) -> Outcome:
    """All clients at once."""
    requests = [request_bytes(plan, body) for body in plan.bodies]
    began_s, began_cpu_s = time.perf_counter(), time.process_time()

    async def one(number: int) -> list[Exchange]:
        await asyncio.sleep(plan.ramp_s * number / plan.clients)
        return [await ask(plan, requests[number % len(requests)]) for _ in range(plan.requests)]

    exchanges = [each for found in await asyncio.gather(*map(one, range(plan.clients))) for each in found]
    duration_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return judged(exchanges, plan, duration_s=duration_s, cpu_s=cpu_s)


def judged(exchanges: Sequence[Exchange], plan: Plan, *, duration_s: float, cpu_s: float) -> Outcome:
    """What the exchanges come to. Tokens of wrong answers do not count."""
    faults = []
    for exchange in exchanges:
        try:
            fault = check(exchange, plan.tokens)
        except ValueError as problem:
            fault = f"not a whole answer: {problem}"
        if fault is not None:
            faults.append(fault)
    gaps = [gap for exchange in exchanges for gap in exchange.gaps_s()] or [0.0]
    waits = [wait for exchange in exchanges if (wait := exchange.ttft_s()) is not None] or [0.0]
    right = len(exchanges) - len(faults)
    return Outcome(
        answers=right,
        errors=len(faults) + (plan.clients * plan.requests - len(exchanges)),
        first_errors=tuple(faults[:ERRORS_KEPT]),
        tokens=right * plan.tokens,
        duration_s=duration_s,
        ttft_p50_s=percentile(waits, 0.5),
        ttft_p99_s=percentile(waits, 0.99),
        gap_p50_s=percentile(gaps, 0.5),
        gap_p99_s=percentile(gaps, 0.99),
        gap_max_s=max(gaps),
        cpu_s=cpu_s,
    )


def start(plan: Plan) -> "subprocess.Popen[bytes]":
    """Start the clients' process; give it to ``finish``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.clients"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(json.dumps(asdict(plan)).encode())
    process.stdin = None
    return process


def finish(process: "subprocess.Popen[bytes]", *, within_s: float) -> Outcome:
    """What the clients saw. Raises NotMeasured when their process failed or took too long; ends it in any case."""
    try:
        output, _ = process.communicate(timeout=within_s)
        if process.returncode != 0:
            raise NotMeasured(f"the clients ended with {process.returncode}")
        values = json.loads(output)
        return Outcome(**{**values, "first_errors": tuple(values["first_errors"])})
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"the clients were not done within {within_s:g} s") from None
    finally:
        process.kill()
        process.wait()


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    print(json.dumps(asdict(uvloop.run(run(plan)))))


if __name__ == "__main__":
    main()
