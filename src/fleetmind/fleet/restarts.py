"""When a model that failed may be started again.

Pure: the time comes in as a value. One record per model, changed by what was seen of its replicas. Two cases, because
they differ in what they tell: a replica that never became ready will most likely not the next time either; one that
served and then died (a bug, a kill) most likely will.

  start failed   pause, doubling; after ``restarts_max`` in a row the model is failed, and tried once every
                 ``failed_retry_s`` from then on
  crashed        at once; only if it crashed soon after becoming ready, a second time in a row or more, pause, doubling.
                 Never failed: however often it is killed, it comes back

The invariant: a model is never given up for good, and never started more often than the pauses allow.
"""

from dataclasses import dataclass, replace

SHORT_LIFE_S = 10.0
"""A replica that crashes sooner than this after becoming ready may be about to do so each time."""
_DOUBLINGS_MAX = 30


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The pauses. Seconds, but for ``restarts_max``: consecutive starts without success before a model is failed."""

    restarts_max: int = 3
    backoff_s: float = 0.5
    backoff_s_max: float = 30.0
    failed_retry_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Restarts:
    """What is remembered of a model's failures. ``not_before_s`` is on the monotonic clock."""

    failed_starts: int = 0
    short_lives: int = 0
    not_before_s: float = 0.0
    is_failed: bool = False
    reason: str = ""


def start_failed(before: Restarts, reason: str, now_s: float, policy: RestartPolicy) -> Restarts:
    """A start that never became ready."""
    failures = before.failed_starts + 1
    is_failed = failures >= max(1, policy.restarts_max)
    pause_s = policy.failed_retry_s if is_failed else _pause_s(failures, policy)
    return replace(before, failed_starts=failures, not_before_s=now_s + pause_s, is_failed=is_failed, reason=reason)


def became_ready(before: Restarts) -> Restarts:
    """A start that succeeded. Short lives are forgotten only when a life was long."""
    return Restarts(short_lives=before.short_lives)


def crashed(before: Restarts, reason: str, lived_s: float, now_s: float, policy: RestartPolicy) -> Restarts:
    """A ready replica that ended by itself after ``lived_s``."""
    short_lives = before.short_lives + 1 if lived_s < SHORT_LIFE_S else 0
    pause_s = _pause_s(short_lives - 1, policy)
    return replace(before, short_lives=short_lives, not_before_s=now_s + pause_s, reason=reason)


def _pause_s(failures: int, policy: RestartPolicy) -> float:
    """Nothing for none, then the pause, doubling."""
    if failures < 1:
        return 0.0
    return min(policy.backoff_s_max, policy.backoff_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX))
