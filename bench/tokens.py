"""Tokens a second through Fleetmind beside the same engine asked directly, for 1, 4 and 16 clients, with a real model.

The direct engine is a twin of Fleetmind's own replica (same program, file, context, slots and threads) and rests while
the other is asked. Both get the same prompts in the same order, every answer has the same length, and tokens are
counted from the usage in the answers. The ratio is the median of the rounds' ratios: a round asks both right after one
another, first one and then the other first.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import clients, engine, processes, results
from bench.processes import NotMeasured
from bench.server import Server

MODEL = "smollm2-135m-instruct"
REQUESTS = {1: 4, 4: 2, 16: 1}
"""How often each of so many clients asks: every measurement takes some seconds."""
TOKENS = 128 if results.is_full() else 64
SILENCE_S_MAX, MEASURE_S_MAX = 240.0, 300.0  # sixteen clients wait for four slots, and a laden machine is slow
DIRECT = "engine asked directly"
RATIO_MIN = 0.97
SUBJECTS = (
    "a lighthouse", "the tides", "a bicycle", "bread", "the moon", "a clock", "rivers", "a compass",
    "snow", "an orchard", "a violin", "the desert", "a bridge", "glass", "an owl", "the harbour",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement of both."""

    ours: clients.Outcome
    direct: clients.Outcome


def plan(port: int, key: str, count: int) -> clients.Plan:
    """What ``count`` clients ask."""
    bodies = [
        json.dumps(
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"Write a long story about {subject}."}],
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "temperature": 0,
                "seed": 1,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        for subject in SUBJECTS
    ]
    return clients.Plan(
        port=port,
        path="/v1/chat/completions",
        key=key,
        bodies=tuple(bodies),
        clients=count,
        requests=REQUESTS[count],
        tokens=TOKENS,
        silence_s_max=SILENCE_S_MAX,
    )


def measure(port: int, key: str, count: int) -> clients.Outcome:
    """Ask once. Raises NotMeasured when an answer was wrong: then there is no figure."""
    outcome = clients.finish(clients.start(plan(port, key, count)), within_s=MEASURE_S_MAX)
    if outcome.errors:
        raise NotMeasured(f"{outcome.errors} answers of {count} clients were wrong: {outcome.first_errors[0]}")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tokens", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5 if results.is_full() else 3)
    rounds = parser.parse_args().rounds
    processes.end_on_terminate()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetmind-bench-")))
        # A llama-server on the PATH would be another engine than the twin's.
        server = Server(folder / "home", preload=True, env={"FLEETMIND_NODE_LLAMA_SERVER": "off"})
        stack.callback(server.stop)
        key = server.create_key()
        model = next(each for each in server.manage("GET", "/api/models")["models"] if each["name"] == MODEL)
        direct = engine.start_llamacpp(model, folder)
        stack.enter_context(direct.running)
        found: dict[int, list[Round]] = {count: [] for count in REQUESTS}
        _both(server.port, key, direct, 4, is_ours_first=True)  # warms both up
        for number in range(rounds):
            results.say(f"round {number + 1} of {rounds}")
            for count, measured in found.items():
                try:
                    measured.append(_both(server.port, key, direct, count, is_ours_first=number % 2 == 0))
                except NotMeasured:
                    results.say(server.logs())
                    raise
    rows = [each for count, measured in found.items() for each in findings(count, measured)]
    about = {"rounds": rounds, "tokens_per_answer": TOKENS, "slots": model["slots"], "model": MODEL}
    results.publish("tokens", rows, about=about)
    return 0


def _both(port: int, key: str, direct: engine.Direct, count: int, *, is_ours_first: bool) -> Round:
    if is_ours_first:
        ours = measure(port, key, count)
        return Round(ours, measure(direct.port, direct.key, count))
    theirs = measure(direct.port, direct.key, count)
    return Round(measure(port, key, count), theirs)


def findings(count: int, measured: Sequence[Round]) -> list[results.Row]:
    """The rows for ``count`` clients."""
    who = f"{count} client{'s' if count > 1 else ''}"
    return [
        results.paired(
            f"tokens a second, {who}",
            "tokens/s",
            [each.ours.tokens_per_s for each in measured],
            [each.direct.tokens_per_s for each in measured],
            baseline_name=DIRECT,
            target=results.at_least(RATIO_MIN),
        ),
        results.paired(
            f"time to first token, median, {who}",
            "ms",
            [each.ours.ttft_p50_s * 1e3 for each in measured],
            [each.direct.ttft_p50_s * 1e3 for each in measured],
            baseline_name=DIRECT,
        ),
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotMeasured as problem:
        sys.exit(str(problem))
