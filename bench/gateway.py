"""What a gateway costs: Fleetmind, LiteLLM's proxy, a bare ASGI + aiohttp proxy and the upstream alone, in one run.

All stand before the same nginx, on the same two cores as the load generator. Rounds are interleaved, each starting
with another peer, and the median of the rounds counts. Fleetmind runs with authentication, limits, metrics and usage
accounting on, as by default. A peer whose answers were wrong, or that was not installed, has no figures.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from bench import load, processes, results, upstream
from bench.peers import litellm_proxy
from bench.processes import Memory, NotMeasured, Running
from bench.server import Server
from bench.upstream import STREAM, STREAM_TEXTS, WHOLE, WHOLE_TEXTS

CONNECTIONS = 32
FLEETMIND, LITELLM, BARE, UPSTREAM = "Fleetmind", "LiteLLM", "bare proxy", "upstream"
NAMES = (UPSTREAM, BARE, LITELLM, FLEETMIND)
PRIME_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """One way to ask: whole or streamed, over so many connections."""

    is_streamed: bool
    connections: int

    def __str__(self) -> str:
        kind = "streamed" if self.is_streamed else "whole"
        return f"{kind} answers, {self.connections} connection{'s' if self.connections > 1 else ''}"


SPEED = attrgetter("requests_per_s")
P50 = attrgetter("p50_ms")
P99 = attrgetter("p99_ms")
CASES = tuple(Case(is_streamed, connections) for is_streamed in (False, True) for connections in (CONNECTIONS, 1))


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the run takes."""

    rounds: int
    loaded_s: float
    alone_s: float

    def duration_s(self, case: Case, name: str) -> float:
        """Seconds of one measurement. LiteLLM gets twice as long under load, for enough answers."""
        if case.connections == 1:
            return self.alone_s
        return self.loaded_s * (2 if name == LITELLM else 1)


SHORT, FULL = Pace(rounds=3, loaded_s=2, alone_s=1), Pace(rounds=7, loaded_s=3, alone_s=2)
VERIFY_S = 2.0
SETTLE_S = 2.0


@dataclass(slots=True)
class Peer:
    """One contender: where it answers, what process it is, and what was measured of it."""

    name: str
    running: Running
    loads: tuple[load.Load, load.Load]
    memory: Callable[[], Memory]
    idle: Memory | None = None
    loaded: Memory | None = None
    verified: dict[bool, tuple[float, float]] = field(default_factory=dict)
    rounds: dict[Case, list[load.Measured]] = field(default_factory=dict)
    cpu_ms: dict[Case, list[float]] = field(default_factory=dict)
    fault: str | None = None

    def asked(self, case: Case) -> load.Load:
        return self.loads[case.is_streamed]

    def values(self, case: Case, what: Callable[[load.Measured], float]) -> list[float]:
        """A value of every round; none when any round was unsound."""
        return [what(each) for each in self.rounds.get(case, [])] if self.fault is None else []

    def median(self, case: Case, what: Callable[[load.Measured], float]) -> float | None:
        """The median of the rounds; None when there are none."""
        values = self.values(case, what)
        return results.median(values) if values else None

    def cpu(self, case: Case) -> float | None:
        """Processor milliseconds a request, median of the rounds: the same number as seconds in 1000 requests."""
        spent = self.cpu_ms.get(case, [])
        return results.median(spent) if spent and self.fault is None else None


def main() -> int:
    arguments = _arguments()
    processes.end_on_terminate()
    pace = FULL if results.is_full() else SHORT
    if arguments.rounds:
        pace = replace(pace, rounds=arguments.rounds)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetmind-bench-")))
        peers = list(_start_peers(folder, stack, [name for name in NAMES if name not in arguments.without]))
        time.sleep(SETTLE_S)
        for peer in peers:
            peer.idle = peer.memory()
        _verify(peers)
        for number in range(pace.rounds):
            results.say(f"round {number + 1} of {pace.rounds}")
            _round(peers, first=number, pace=pace)
        for peer in peers:
            peer.loaded = peer.memory()
    print(measured_table(peers))
    print(cost_table(peers) + "\n")
    rows = findings({peer.name: peer for peer in peers})
    about = {"rounds": pace.rounds, "round_s": pace.loaded_s, "measured": matrix(peers), "versions": versions()}
    if rows:
        results.publish("gateway", rows, about=about)
    else:
        results.say("Fleetmind was not measured, so nothing is written")
    return 1 if any(peer.fault for peer in peers) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--without", action="append", default=[], choices=NAMES[1:], help="leave a peer out")
    parser.add_argument("--rounds", type=int, default=0, help="rounds instead of the run's own")
    return parser.parse_args()


def versions() -> dict[str, str]:
    """Of the peers that change."""
    return {LITELLM: litellm_proxy.version()} if litellm_proxy.is_installed() else {}


# Starting


def _start_peers(folder: Path, stack: ExitStack, names: Sequence[str]) -> Iterator[Peer]:
    """Start the upstream and those that stand before it; a peer that isn't there is said and left out."""
    bodies = folder / "whole.json", folder / "stream.json"
    for is_streamed, path in enumerate(bodies):
        path.write_bytes(upstream.question(STREAM if is_streamed else WHOLE, stream=bool(is_streamed)))
    nginx, upstream_port = upstream.start(folder / "nginx")
    stack.enter_context(nginx)

    def peer(
        name: str,
        running: Running,
        port: int,
        *,
        key: str = "none",
        prefix: str = "",
        memory: Callable[[], Memory] | None = None,
    ) -> Peer:
        base = f"http://127.0.0.1:{port}"
        loads = (
            load.Load(f"{base}/v1/chat/completions", bodies[0], key, WHOLE_TEXTS),
            load.Load(f"{base}{prefix}/v1/chat/completions", bodies[1], key, STREAM_TEXTS),
        )
        return Peer(name, running, loads, memory or running.memory)

    if UPSTREAM in names:
        yield peer(UPSTREAM, nginx, upstream_port, prefix="/stream")
    if BARE in names:
        bare, port = _start_bare(folder, upstream_port)
        stack.enter_context(bare)
        yield peer(BARE, bare, port, prefix="/stream")
    if LITELLM in names:
        if litellm_proxy.is_installed():
            proxy, port = litellm_proxy.start(folder / "litellm", upstream_port)
            stack.enter_context(proxy)
            yield peer(LITELLM, proxy, port, key=litellm_proxy.MASTER_KEY)
        else:
            results.say("LiteLLM is left out: it is not installed (run bench/peers/install)")
    if FLEETMIND in names:
        server = Server(folder / "home", preload=False)
        stack.callback(server.stop)
        base = f"http://127.0.0.1:{upstream_port}"
        server.add_model(WHOLE, source="remote", url=f"{base}/v1", remote_model=WHOLE)
        server.add_model(STREAM, source="remote", url=f"{base}/stream/v1", remote_model=STREAM)
        yield peer(FLEETMIND, server.running, server.port, key=server.create_key(), memory=server.memory)


def _start_bare(folder: Path, upstream_port: int) -> tuple[Running, int]:
    port = processes.free_port()
    argv = (
        sys.executable, "-m", "uvicorn", "bench.peers.bare_proxy:app", "--host", "127.0.0.1", "--port", str(port),
        "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning",
    )  # fmt: skip
    running = Running(
        BARE,
        argv,
        log=folder / "bare.log",
        env={"BARE_PROXY_UPSTREAM": f"http://127.0.0.1:{upstream_port}"},
        cwd=Path(__file__).parent.parent,
    )
    try:
        running.wait_until(processes.answers(port, "/v1/models"), within_s=20)
    except BaseException:
        running.stop()
        raise
    return running, port


# Measuring


def _verify(peers: Sequence[Peer]) -> None:
    """Warm every peer up while looking into every answer; an unsound peer takes no further part."""
    for peer in peers:
        try:
            for is_streamed in (False, True):
                _prime(peer, is_streamed=is_streamed)
                peer.verified[is_streamed] = load.verify(
                    peer.loads[is_streamed], connections=CONNECTIONS, duration_s=VERIFY_S
                )
            results.say(f"{peer.name} answers rightly")
        except load.Unsound as problem:
            _give_up(peer, problem)


def _prime(peer: Peer, *, is_streamed: bool) -> None:
    """Ask alone until the first right answer: some peers load half of themselves at the first call."""
    asked = peer.loads[is_streamed]
    port, _, path = asked.url.removeprefix("http://127.0.0.1:").partition("/")
    deadline = time.monotonic() + PRIME_S_MAX
    while True:
        answer = processes.ask(int(port), "POST", f"/{path}", body=asked.body.read_bytes(), key=asked.key)
        if answer.status == 200 and all(text.encode() in answer.body for text in asked.texts):
            return
        if time.monotonic() > deadline:
            raise load.Unsound(f"{asked.url} answers {answer.status}: {answer.body[:300]!r}")
        time.sleep(0.2)


def _round(peers: Sequence[Peer], *, first: int, pace: Pace) -> None:
    """Every case at every peer once, peers side by side within a case."""
    for case in CASES:
        for turn in range(len(peers)):
            peer = peers[(first + turn) % len(peers)]
            if peer.fault is not None:
                continue
            before_s = peer.running.cpu_s()
            try:
                measured = load.measure(
                    peer.asked(case),
                    connections=case.connections,
                    duration_s=pace.duration_s(case, peer.name),
                    verified=peer.verified[case.is_streamed],
                )
            except load.Unsound as problem:
                _give_up(peer, problem)
                continue
            peer.rounds.setdefault(case, []).append(measured)
            peer.cpu_ms.setdefault(case, []).append((peer.running.cpu_s() - before_s) * 1e3 / measured.requests)


def _give_up(peer: Peer, problem: load.Unsound) -> None:
    peer.fault = str(problem)
    results.say(f"FAILED, not measured: {peer.name}: {problem}\n{peer.running.log_tail()}")


# Reporting


def matrix(peers: Sequence[Peer]) -> dict[str, dict[str, float | str]]:
    """Everything that was measured, by peer."""
    found: dict[str, dict[str, float | str]] = {}
    for peer in peers:
        values: dict[str, float | None] = {}
        for case in CASES:
            values[f"{case}: requests/s"] = peer.median(case, SPEED)
            values[f"{case}: p50 ms"] = peer.median(case, P50)
            values[f"{case}: p99 ms"] = peer.median(case, P99)
            values[f"{case}: processor s in 1000 requests"] = peer.cpu(case)
        for when, memory in (("idle", peer.idle), ("after the load", peer.loaded)):
            values[f"resident {when}, MB"] = memory.rss_bytes / 1e6 if memory else None
            values[f"proportional {when}, MB"] = memory.pss_bytes / 1e6 if memory else None
        kept: dict[str, float | str] = {
            name: results.rounded(value) for name, value in values.items() if value is not None
        }
        found[peer.name] = {"failed": peer.fault} if peer.fault else kept
    return found


def measured_table(peers: Sequence[Peer]) -> str:
    """Speed, one line a contender and way to ask; the last column is throughput as a part of the bare proxy's."""
    bare = next((peer for peer in peers if peer.name == BARE), None)
    rows = []
    for case in CASES:
        for peer in peers:
            figures = (
                peer.median(case, SPEED),
                peer.median(case, P50),
                peer.median(case, P99),
                peer.cpu(case),
                None if bare is None else of_bare(peer, bare, case),
            )
            rows.append((f"{case}: {peer.name}", *map(results.number, figures)))
    headings = ("", "requests/s", "p50 ms", "p99 ms", "processor s / 1000", "of bare proxy")
    return results.table(headings, rows) + "\n"


def of_bare(peer: Peer, bare: Peer, case: Case) -> float | None:
    """A contender's throughput in the bare proxy's, median of the rounds' ratios."""
    mine, theirs = peer.values(case, SPEED), bare.values(case, SPEED)
    return results.median([one / other for one, other in zip(mine, theirs, strict=True)]) if mine and theirs else None


def cost_table(peers: Sequence[Peer]) -> str:
    """Memory, one line a contender."""
    rows = []
    for peer in peers:
        memories = [peer.idle, peer.loaded]
        cells = [
            results.number(None if memory is None else value / 1e6)
            for memory in memories
            for value in ((memory.rss_bytes, memory.pss_bytes) if memory else (0, 0))
        ]
        rows.append((peer.name, *cells))
    return results.table(("MB", "idle RSS", "idle PSS", "RSS after", "PSS after"), rows)


def findings(peers: dict[str, Peer]) -> list[results.Row]:
    """The rows: ours beside each peer. Empty when Fleetmind was not measured."""
    ours = peers.get(FLEETMIND)
    if ours is None or ours.fault is not None:
        return []
    rows: list[results.Row] = []
    rows += _speeds(ours, peers)
    rows += _latencies(ours, peers)
    rows += _costs(ours, peers)
    return rows


def _speeds(ours: Peer, peers: dict[str, Peer]) -> Iterator[results.Row]:
    least = {LITELLM: results.at_least(20), BARE: results.at_least(0.5)}
    for case in CASES:
        if case.connections == 1:
            continue
        for name, target in least.items():
            yield from _beside(f"throughput, {case}", "requests/s", ours, peers.get(name), case, SPEED, target)
            yield from _beside(f"p50, {case}", "ms", ours, peers.get(name), case, P50)
            yield from _beside(f"p99, {case}", "ms", ours, peers.get(name), case, P99)


def _latencies(ours: Peer, peers: dict[str, Peer]) -> Iterator[results.Row]:
    """What each adds to the upstream's own median, asked one at a time."""
    alone = peers.get(UPSTREAM)
    for case in CASES:
        if case.connections > 1 or alone is None:
            continue
        yield from _beside(f"p50, {case}", "ms", ours, alone, case, P50)
        base, mine = alone.values(case, P50), ours.values(case, P50)
        for name in (BARE, LITELLM):
            theirs = peers[name].values(case, P50) if name in peers else []
            if base and theirs:
                yield results.paired(
                    f"added at the median, {case}",
                    "ms",
                    [one - zero for one, zero in zip(mine, base, strict=True)],
                    [one - zero for one, zero in zip(theirs, base, strict=True)],
                    baseline_name=name,
                    target=results.at_most(0.5),
                )


def _costs(ours: Peer, peers: dict[str, Peer]) -> Iterator[results.Row]:
    for name in (LITELLM, BARE):
        theirs = peers.get(name)
        if theirs is None or theirs.fault is not None:
            continue
        for what, mine, other, target in (
            ("idle RSS", ours.idle, theirs.idle, results.at_most(120)),
            ("RSS after the load", ours.loaded, theirs.loaded, None),
        ):
            if mine is not None and other is not None:
                rss, baseline = mine.rss_bytes / 1e6, other.rss_bytes / 1e6
                yield results.row(
                    f"{what} of the server", "MB", rss, baseline=baseline, baseline_name=name, target=target
                )
        for case in CASES:
            if case.connections > 1:
                yield results.paired(
                    f"processor in 1000 requests, {case}",
                    "s",
                    ours.cpu_ms[case],
                    theirs.cpu_ms[case],
                    baseline_name=name,
                )


def _beside(
    what: str,
    unit: str,
    ours: Peer,
    theirs: Peer | None,
    case: Case,
    value: Callable[[load.Measured], float],
    target: results.Target | None = None,
) -> Iterator[results.Row]:
    """A row if both were measured."""
    mine, other = ours.values(case, value), [] if theirs is None else theirs.values(case, value)
    if theirs is not None and mine and other:
        yield results.paired(what, unit, mine, other, baseline_name=theirs.name, target=target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotMeasured as problem:
        sys.exit(str(problem))
