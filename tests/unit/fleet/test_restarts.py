"""When a failed model may start again."""

from hypothesis import given
from hypothesis import strategies as st

from fleetmind.fleet.restarts import RestartPolicy, Restarts, became_ready, crashed, start_failed

POLICY = RestartPolicy(restarts_max=3, backoff_s=0.5, backoff_s_max=4.0, failed_retry_s=60.0)


def test_starts_that_fail_are_spaced_further_and_further_and_then_given_a_rest() -> None:
    record, pauses = Restarts(), []
    for _ in range(5):
        record = start_failed(record, "no", 100.0, POLICY)
        pauses.append((record.not_before_s - 100.0, record.is_failed))
    assert pauses == [(0.5, False), (1.0, False), (60.0, True), (60.0, True), (60.0, True)]


def test_a_start_that_succeeds_clears_the_failures() -> None:
    record = became_ready(start_failed(Restarts(), "no", 0.0, POLICY))
    assert (record.failed_starts, record.is_failed, record.not_before_s) == (0, False, 0.0)


def test_a_crash_after_a_long_life_is_answered_at_once() -> None:
    record = Restarts()
    for _ in range(50):
        record = crashed(became_ready(record), "killed", 11.0, 100.0, POLICY)
        assert record.not_before_s == 100.0


def test_short_lives_are_spaced_from_the_second_on_and_never_given_up() -> None:
    record, pauses = Restarts(), []
    for _ in range(50):
        record = crashed(became_ready(record), "killed", 1.0, 100.0, POLICY)
        pauses.append(record.not_before_s - 100.0)
        assert not record.is_failed
    assert pauses[:6] == [0.0, 0.5, 1.0, 2.0, 4.0, 4.0]
    assert set(pauses[6:]) == {4.0}


def test_one_long_life_forgives_the_short_ones() -> None:
    record = Restarts(short_lives=20)
    assert crashed(record, "killed", 60.0, 0.0, POLICY).short_lives == 0


def test_at_least_one_start_is_made() -> None:
    assert start_failed(Restarts(), "no", 0.0, RestartPolicy(restarts_max=0)).is_failed


@given(events=st.lists(st.one_of(st.none(), st.floats(0, 100)), max_size=200))
def test_no_pause_is_longer_than_allowed_whatever_happens(events: list[float | None]) -> None:
    record = Restarts()
    for lived_s in events:
        if lived_s is None:
            record = start_failed(record, "no", 0.0, POLICY)
            assert 0.0 < record.not_before_s <= POLICY.failed_retry_s
        else:
            record = crashed(became_ready(record), "killed", lived_s, 0.0, POLICY)
            assert 0.0 <= record.not_before_s <= POLICY.backoff_s_max
