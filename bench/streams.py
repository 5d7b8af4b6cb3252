"""A thousand streaming clients at once: errors, stalls and memory, on the fake engine.

The fake engine gives every stream five tokens a second, so the load is connections and events, not arithmetic. The
same clients ask the engine directly first; what it and the load generator do to the gaps is seen there.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import clients, engine, processes, results
from bench.processes import Memory, NotMeasured
from bench.server import Server

STREAMS = 1000
TOKENS_PER_S = 5.0
RAMP_S = 1.0
MODEL = "fake-streams"
DIRECT = "engine asked directly"
STALL_S_MAX = 1.0
RSS_MB_MAX = 300
SAMPLE_S = 0.25


def plan(port: int, key: str, streams: int, tokens: int) -> clients.Plan:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Go on until you are told to stop."}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return clients.Plan(
        port=port,
        path="/v1/chat/completions",
        key=key,
        bodies=(json.dumps(body),),
        clients=streams,
        requests=1,
        tokens=tokens,
        ramp_s=RAMP_S,
        silence_s_max=30.0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--seconds", type=float, default=60.0 if results.is_full() else 20.0)
    arguments = parser.parse_args()
    processes.end_on_terminate()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetmind-bench-")))
        server = Server(folder / "home", preload=False)
        stack.callback(server.stop)
        tokens = round(arguments.seconds * TOKENS_PER_S)
        options = {"tokens_per_s": TOKENS_PER_S, "slots": arguments.streams, "reply_tokens": tokens}
        server.add_model(MODEL, source="fake", slots=arguments.streams, context_tokens=4096, options=options)
        key = server.create_key()
        model = next(each for each in server.manage("GET", "/api/models")["models"] if each["name"] == MODEL)
        direct = engine.start_fake(model, options, folder)
        stack.enter_context(direct.running)
        results.say(f"{arguments.streams} streams at the engine itself")
        alone, _ = measure(plan(direct.port, direct.key, arguments.streams, tokens), direct.running.memory)
        results.say(f"{arguments.streams} streams through Fleetmind")
        idle, before_s = server.memory(), server.running.cpu_s()
        ours, peak = measure(plan(server.port, key, arguments.streams, tokens), server.memory)
        cpu_s = server.running.cpu_s() - before_s
    for name, outcome in (("engine", alone), ("Fleetmind", ours)):
        for error in outcome.first_errors:
            results.say(f"{name}: {error}")
    about = {
        "streams": arguments.streams,
        "tokens_per_s": TOKENS_PER_S,
        "seconds": arguments.seconds,
        "clients_cpu_s": round(ours.cpu_s, 2),
        "server_and_engine_cpu_s": round(cpu_s, 2),
    }
    results.publish("streams", findings(ours, alone, idle, peak), about=about)
    return 1 if ours.errors or alone.errors else 0


def measure(asked: clients.Plan, memory: Callable[[], Memory]) -> tuple[clients.Outcome, Memory]:
    """What the clients saw, and the most memory the server held meanwhile."""
    process = clients.start(asked)
    peak = memory()
    while process.poll() is None:
        time.sleep(SAMPLE_S)
        peak = max(peak, memory(), key=lambda each: each.rss_bytes)
    return clients.finish(process, within_s=10), peak


def findings(ours: clients.Outcome, alone: clients.Outcome, idle: Memory, peak: Memory) -> list[results.Row]:
    """The rows; only the errors when there were any, for nothing else means much then.

    A stall is the longest gap within a stream, less the engine's own pace.
    """
    pace_s = 1 / TOKENS_PER_S

    def beside(what: str, unit: str, mine: float, theirs: float, target: results.Target | None = None) -> results.Row:
        return results.row(what, unit, mine, baseline=theirs, baseline_name=DIRECT, target=target)

    errors = beside("errors", "answers", ours.errors, alone.errors, results.at_most(0))
    if ours.errors or alone.errors:
        return [errors]
    return [
        errors,
        beside(
            "longest stall in a stream", "s", ours.gap_max_s - pace_s, alone.gap_max_s - pace_s,
            results.at_most(STALL_S_MAX),
        ),
        beside("gap between events, p99", "s", ours.gap_p99_s, alone.gap_p99_s),
        beside("time to first token, median", "s", ours.ttft_p50_s, alone.ttft_p50_s),
        beside("time to first token, p99", "s", ours.ttft_p99_s, alone.ttft_p99_s),
        beside("tokens a second", "tokens/s", ours.tokens_per_s, alone.tokens_per_s),
        results.row("peak RSS of the server", "MB", peak.rss_bytes / 1e6, target=results.at_most(RSS_MB_MAX)),
        results.row("RSS of the server before", "MB", idle.rss_bytes / 1e6),
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotMeasured as problem:
        sys.exit(str(problem))
