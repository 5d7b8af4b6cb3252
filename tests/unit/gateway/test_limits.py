import pytest

from fleetmind.core.errors import QueueFull
from fleetmind.core.types import ModelName
from fleetmind.gateway.limits import RETRY_AFTER_S_MAX, RETRY_AFTER_S_MIN, QueuePolicy, check_queue, retry_after_s

MODEL = ModelName("m")


def test_the_line_is_bounded_exactly() -> None:
    policy = QueuePolicy(calls_max=2)
    check_queue(MODEL, 1, 1, 1.0, policy)
    with pytest.raises(QueueFull) as full:
        check_queue(MODEL, 2, 1, 3.0, policy)
    assert full.value.retry_after_s == 6.0


def test_retry_after_is_the_time_in_which_the_line_drains() -> None:
    assert retry_after_s(waiting=8, slots=4, call_s=5.0) == 10.0
    assert retry_after_s(waiting=0, slots=4, call_s=5.0) == RETRY_AFTER_S_MIN
    assert retry_after_s(waiting=10_000, slots=0, call_s=5.0) == RETRY_AFTER_S_MAX
