"""Whether a replica that stopped answering is dead or only busy.

Pure. A busy engine is not dead: one that computes or logs is making progress, and is given time. An engine that neither
answers nor moves is given up after a few probes; one that moves but does not answer, after long. The end of a process
is not judged here: it is seen at once.

    1  answers                                       alive, forget earlier failures
    2  says that it is broken                        dead
    3  silent, fewer than PROBE_FAILURES_MAX times   wait
    4  silent, and no progress since it fell silent  dead
    5  silent for SILENT_S_MAX, progress or not      dead
"""

from dataclasses import dataclass, replace

from fleetmind.node.engine import Health, HealthState

PROBE_FAILURES_MAX = 3
SILENT_S_MAX = 120.0
PROGRESS_MIN = 0.05
"""Less progress than this during PROBE_FAILURES_MAX probes is none: an idle server ticks too."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is remembered between probes. ``progress`` is any number that only grows while the engine works, as it was
    when the failures began to be counted."""

    failures: int = 0
    silent_since_s: float = 0.0
    progress: float = 0.0


def judge(pulse: Pulse, health: Health, *, progress: float, at_s: float) -> tuple[Pulse, str]:
    """The pulse after a probe, and why the replica is dead, or "" while it is not. ``at_s`` is monotonic."""
    if health.state is HealthState.READY:  # 1
        return Pulse(progress=progress), ""
    if health.state is HealthState.FAILED:  # 2
        return pulse, health.detail or "the engine says that it failed"
    if pulse.failures == 0:
        return Pulse(failures=1, silent_since_s=at_s, progress=progress), ""
    seen = replace(pulse, failures=pulse.failures + 1)
    silent_s = at_s - seen.silent_since_s
    if silent_s >= SILENT_S_MAX:  # 5
        return seen, f"has not answered for {silent_s:.0f} s: {health.detail}"
    if seen.failures < PROBE_FAILURES_MAX:  # 3
        return seen, ""
    if progress - pulse.progress >= PROGRESS_MIN:  # it moves: count anew from here
        return replace(seen, failures=1, progress=progress), ""
    return seen, f"hangs: {seen.failures} probes without answer and no progress: {health.detail}"  # 4
