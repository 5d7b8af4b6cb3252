"""Load from wrk: a closed loop over a fixed number of connections, and the proof that the answers were right.

First a verifying run looks into every answer at full concurrency. The measuring runs after it count statuses and
bytes: an answer that is shorter or longer than the verified ones gives the run away. A run with any of these wrong is
an ``Unsound``, and has no figures.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("wrk.lua")
BYTES_TOLERANCE = 0.05


class Unsound(Exception):
    """The answers under load were not what they should be, so their speed means nothing."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, of whom. ``texts`` must all be in each answer's body."""

    url: str
    body: Path
    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What wrk saw. Latencies are from the first byte sent to the last received, over a closed loop."""

    requests: int
    duration_s: float
    bytes_read: int
    p50_ms: float
    p99_ms: float
    wrong: int
    status_errors: int
    socket_errors: int
    timeouts: int

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.duration_s


def parse(output: str) -> Measured:
    """Read what ``wrk.lua`` printed at the end. Raises Unsound when wrk never got that far."""
    lines = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    if len(lines) != 1:
        raise Unsound(f"wrk reported nothing:\n{output}")
    values = json.loads(lines[0])
    return Measured(
        requests=values["requests"],
        duration_s=values["duration_us"] / 1e6,
        bytes_read=values["bytes"],
        p50_ms=values["p50_us"] / 1e3,
        p99_ms=values["p99_us"] / 1e3,
        wrong=values["wrong"],
        status_errors=values["status_errors"],
        socket_errors=values["socket_errors"],
        timeouts=values["timeouts"],
    )


def bytes_range(measured: Measured, connections: int) -> tuple[float, float]:
    """The least and most bytes that an answer can have had: wrk stops in the middle of up to one more a connection."""
    return measured.bytes_read / (measured.requests + connections), measured.bytes_read / measured.requests


def fault(measured: Measured, *, connections: int, verified: tuple[float, float] | None = None) -> str | None:
    """Why the figures are not to be believed, or None. ``verified`` is the range of bytes of a right answer."""
    if measured.requests == 0:
        return "no answer at all"
    for count, what in (
        (measured.status_errors, "answers with a status other than 2xx or 3xx"),
        (measured.socket_errors, "connections failed"),
        (measured.timeouts, "answers timed out"),
        (measured.wrong, "answers with a wrong body"),
    ):
        if count:
            return f"{count} of {measured.requests} {what}"
    if verified is not None:
        least, most = bytes_range(measured, connections)
        if most < verified[0] * (1 - BYTES_TOLERANCE) or least > verified[1] * (1 + BYTES_TOLERANCE):
            return f"{least:.0f} to {most:.0f} bytes an answer where {verified[0]:.0f} to {verified[1]:.0f} were right"
    return None


def verify(load: Load, *, connections: int, duration_s: float) -> tuple[float, float]:
    """Warm the server up while looking into every answer; the range of bytes of a right one. Raises Unsound."""
    measured = _wrk(load, connections=connections, duration_s=duration_s, texts=load.texts)
    problem = fault(measured, connections=connections)
    if problem:
        raise Unsound(f"{load.url}: {problem}")
    return bytes_range(measured, connections)


def measure(load: Load, *, connections: int, duration_s: float, verified: tuple[float, float]) -> Measured:
    """Load without looking into the answers, but counting them. Raises Unsound."""
    measured = _wrk(load, connections=connections, duration_s=duration_s, texts=())
    problem = fault(measured, connections=connections, verified=verified)
    if problem:
        raise Unsound(f"{load.url}: {problem}")
    return measured


def _wrk(load: Load, *, connections: int, duration_s: float, texts: Sequence[str]) -> Measured:
    program = shutil.which("wrk")
    if program is None:
        raise Unsound("wrk is not installed (Debian: apt-get install wrk nginx-light)")
    threads = min(2, connections)
    whole_s = max(1, round(duration_s))  # wrk knows whole seconds only
    argv = [
        program, f"-t{threads}", f"-c{connections}", f"-d{whole_s}s", "--timeout", "20s", "-s", str(SCRIPT), load.url,
        "--", str(load.body), load.key, *texts,
    ]  # fmt: skip
    finished = subprocess.run(argv, capture_output=True, text=True, timeout=whole_s + 60, check=False)
    return parse(finished.stdout + finished.stderr)
