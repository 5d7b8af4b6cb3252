"""What counts as a sound run of the load generator."""

from dataclasses import replace

import pytest
from bench.load import Measured, Unsound, bytes_range, fault, parse

LINE = (
    'RESULT {"requests": 1000, "duration_us": 2000000, "bytes": 500000, "p50_us": 250, "p99_us": 4000, "wrong": 0, '
    '"status_errors": 0, "socket_errors": 0, "timeouts": 0}'
)
RIGHT = (500.0, 500.0)


def sound() -> Measured:
    return parse(f"Running 2s test @ http://127.0.0.1\n  1000 requests in 2.00s\n{LINE}\n")


def test_units_are_converted() -> None:
    measured = sound()
    assert (measured.requests_per_s, measured.p50_ms, measured.p99_ms) == (500, 0.25, 4.0)


@pytest.mark.parametrize("output", ["unable to connect to 127.0.0.1:1 Connection refused", f"{LINE}\n{LINE}", ""])
def test_output_without_one_result_has_no_figures(output: str) -> None:
    with pytest.raises(Unsound):
        parse(output)


def test_a_sound_run_has_no_fault() -> None:
    assert fault(sound(), connections=32, verified=RIGHT) is None


@pytest.mark.parametrize("field", ["wrong", "status_errors", "socket_errors", "timeouts"])
def test_one_wrong_answer_makes_the_run_unsound(field: str) -> None:
    found = fault(replace(sound(), **{field: 1}), connections=32, verified=RIGHT)
    assert found is not None
    assert found.startswith("1 of 1000")


def test_no_answers_are_a_fault_and_not_a_division_by_zero() -> None:
    assert fault(replace(sound(), requests=0), connections=32, verified=RIGHT) == "no answer at all"


def test_the_answers_cut_off_at_the_end_may_be_in_the_bytes() -> None:
    assert bytes_range(replace(sound(), requests=8, bytes_read=400), 2) == (40, 50)
    assert fault(replace(sound(), bytes_read=500 * 1032), connections=32, verified=RIGHT) is None


@pytest.mark.parametrize("bytes_read", [500 * 900, 500 * 1200])
def test_shorter_or_longer_answers_than_the_verified_ones_are_noticed(bytes_read: int) -> None:
    assert "bytes an answer" in (fault(replace(sound(), bytes_read=bytes_read), connections=32, verified=RIGHT) or "")
