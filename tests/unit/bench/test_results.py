"""Rows, ratios and verdicts of the benchmarks."""

import json
from pathlib import Path

import pytest
from bench import results


def test_a_row_has_the_ratio_of_ours_to_the_baseline() -> None:
    row = results.row("throughput", "requests/s", 4000, baseline=200, baseline_name="peer", target=results.at_least(20))
    assert (row.ratio, row.target, row.met) == (20, "ratio >= 20", True)


def test_a_ratio_just_below_its_target_is_not_met_by_rounding() -> None:
    row = results.row("throughput", "requests/s", 19.9999, baseline=1, target=results.at_least(20))
    assert row.met is False


def test_a_target_of_ours_does_not_look_at_the_ratio() -> None:
    assert results.row("rss", "MB", 119, baseline=1, target=results.at_most(120)).met is True
    assert results.row("rss", "MB", 121, baseline=900, target=results.at_most(120)).met is False


def test_a_baseline_of_zero_gives_no_ratio_and_no_verdict_on_one() -> None:
    row = results.row("errors", "answers", 0, baseline=0, target=results.at_least(1))
    assert row.ratio is None
    assert row.met is None


def test_rounds_are_compared_with_their_own_baseline() -> None:
    # The machine halved its speed for the last two rounds: medians apart would say 0.5, every round says 1.
    row = results.paired("speed", "1/s", [200, 100, 100], [200, 100, 100], baseline_name="peer")
    skewed = results.paired("speed", "1/s", [80, 200, 90], [100, 250, 100], baseline_name="peer")
    assert row.ratio == 1
    assert (skewed.ours, skewed.baseline, skewed.ratio) == (90, 100, 0.8)


def test_rounds_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        results.paired("speed", "1/s", [1, 2], [1], baseline_name="peer")


def test_no_figure_comes_from_no_measurement() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        results.median([])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert results.percentile(range(100, 0, -1), share) == expected


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.05678, "0.05678"), (12.3456, "12.35"), (145012.3, "145 012"), (0, "0")]
)
def test_numbers_have_at_most_four_digits_after_what_counts(value: float | None, text: str) -> None:
    assert results.number(value) == text


def test_the_file_holds_the_rows_and_then_the_machine(tmp_path: Path) -> None:
    rows = [results.row("a", "s", 1.0, target=results.at_most(2)), results.row("b", "s", 3.0)]
    path = results.write(tmp_path / "results" / "name.json", rows, {"machine": "two cores", "date": "2026-01-02"})
    first, second, line = json.loads(path.read_text())
    assert list(first) == ["what", "unit", "ours", "baseline", "baseline_name", "ratio", "target", "met"]
    assert (first["target"], first["met"], second["met"]) == ("ours <= 2", True, None)
    assert line["machine"] == "two cores"


def test_a_table_lines_up() -> None:
    lines = results.rows_table([results.row("a long name", "s", 1.5), results.row("b", "requests/s", 2000)]).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert "2 000" in lines[-1]
