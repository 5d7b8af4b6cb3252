"""Following a log shows each line once."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from fleetmind.cli.looking import followed, new_lines

LINES = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=30)


@given(LINES, LINES, st.integers(min_value=1, max_value=40))
def test_a_window_that_moved_over_distinct_lines_shows_exactly_the_new_ones(
    old: list[str], new: list[str], window: int
) -> None:
    log = [f"{number} {line}" for number, line in enumerate(old + new)]
    before, after = log[: len(old)][-window:], log[-window:]
    expected = log[len(old) :][-window:]
    assert new_lines(before, after) == expected


def test_a_log_that_was_begun_anew_is_shown_whole() -> None:
    assert new_lines(["a", "b"], ["c"]) == ["c"]


def test_following_begins_with_the_last_lines_and_goes_on() -> None:
    looks = iter([["1", "2", "3"], ["1", "2", "3"], ["1", "2", "3", "4"], ["3", "4", "5", "6"]])
    lines = followed(lambda: next(looks), first=2, wait=lambda _: None)
    assert list(islice(lines, 5)) == ["2", "3", "4", "5", "6"]
