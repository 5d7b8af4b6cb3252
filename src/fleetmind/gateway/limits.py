"""How many calls a model may have at once and how many may wait for it.

Pure. Two bounds per model: ``slots`` of its ready replicas (calls at engines) and ``calls_max`` (calls waiting).
Whatever is past them is refused with the time after which asking again makes sense.
"""

from dataclasses import dataclass

from fleetmind.core.errors import QueueFull, QueueTimeout
from fleetmind.core.types import ModelName


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The bounds of a model's waiting line: how many calls, and how many seconds each."""

    calls_max: int = 512
    wait_s_max: float = 120.0


RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 120.0


def retry_after_s(waiting: int, slots: int, call_s: float) -> float:
    """When a refused caller should ask again: the time in which the present line drains, by Little's law.

    ``call_s`` is the recent mean seconds of a call; clamped to [RETRY_AFTER_S_MIN, RETRY_AFTER_S_MAX].
    """
    return min(max(waiting * call_s / max(slots, 1), RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)


def check_queue(model: ModelName, waiting: int, slots: int, call_s: float, policy: QueuePolicy) -> None:
    """Raise QueueFull if one more call may not wait."""
    if waiting >= policy.calls_max:
        raise QueueFull(
            f"{waiting} calls are already waiting for {model}, which is the most that may.",
            retry_after_s=retry_after_s(waiting, slots, call_s),
            hint="Ask again later, add replicas or slots, or raise gateway.queue_calls_max.",
        )


def waited_too_long(model: ModelName, waiting: int, slots: int, call_s: float, policy: QueuePolicy) -> QueueTimeout:
    """The refusal of a call that has waited ``wait_s_max``."""
    return QueueTimeout(
        f"No slot of {model} became free within {policy.wait_s_max:.0f} s; {waiting} calls are waiting.",
        retry_after_s=retry_after_s(waiting, slots, call_s),
        hint="Ask again later, add replicas or slots, or raise gateway.queue_wait_s_max.",
    )
