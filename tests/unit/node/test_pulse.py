"""A busy engine is not dead; one that neither answers nor moves is."""

from fleetmind.node.engine import Health, HealthState
from fleetmind.node.pulse import PROBE_FAILURES_MAX, SILENT_S_MAX, Pulse, judge

UP = Health(HealthState.READY)
DOWN = Health(HealthState.UNREACHABLE, detail="no answer")


def run(probes: list[tuple[Health, float]], interval_s: float = 2.0) -> tuple[int, str]:
    """How many probes it took until a verdict, and the verdict; ("" after all of them)."""
    pulse = Pulse()
    for count, (health, progress) in enumerate(probes, 1):
        pulse, reason = judge(pulse, health, progress=progress, at_s=count * interval_s)
        if reason:
            return count, reason
    return len(probes), ""


def test_one_failure_is_forgiven() -> None:
    assert run([(UP, 0), (DOWN, 0), (UP, 0), (DOWN, 0), (UP, 0)] * 5) == (25, "")


def test_silence_without_progress_is_death_after_a_few_probes() -> None:
    count, reason = run([(UP, 7)] + [(DOWN, 7)] * 20)
    assert count == 1 + PROBE_FAILURES_MAX
    assert "hangs" in reason
    assert "no answer" in reason


def test_silence_with_progress_is_patience() -> None:
    assert run([(DOWN, at * 1.5) for at in range(30)]) == (30, "")


def test_progress_that_ends_ends_the_patience() -> None:
    count, reason = run([(DOWN, min(at, 10)) for at in range(40)])
    assert 10 < count <= 10 + 2 * PROBE_FAILURES_MAX
    assert "hangs" in reason


def test_silence_cannot_last_for_ever_whatever_the_progress() -> None:
    count, reason = run([(DOWN, at * 100.0) for at in range(1000)])
    assert SILENT_S_MAX / 2 <= count <= SILENT_S_MAX / 2 + 2
    assert "has not answered for 120 s" in reason


def test_an_engine_that_says_it_failed_is_believed_at_once() -> None:
    assert run([(UP, 0), (Health(HealthState.FAILED, detail="refuses the key"), 9)]) == (2, "refuses the key")


def test_ticking_is_no_progress() -> None:
    assert run([(DOWN, at * 0.01) for at in range(10)])[0] == PROBE_FAILURES_MAX
