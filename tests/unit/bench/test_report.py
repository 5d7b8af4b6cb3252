"""The page of benchmarks shows what was measured and nothing else."""

from dataclasses import asdict

from bench import report, results

PAGE = "Words.\n<!-- bench: speed -->\nold\n<!-- end -->\nMore.\n<!-- bench: size -->\n<!-- end -->\n"
LINE = {"machine": "two cores", "date": "2026-01-02", "run": "full", "rounds": 7, "versions": {"Peer": "1.2"}}


def test_a_result_replaces_what_stood_there_and_the_words_stay() -> None:
    row = asdict(results.row("throughput", "requests/s", 10, baseline=5, baseline_name="Peer"))
    page = report.fill(PAGE, {"speed": [row, LINE]})
    assert "old" not in page
    assert page.startswith("Words.")
    assert "throughput" in page
    assert "two cores. 2026-01-02, full run, rounds 7, Peer 1.2." in page
    assert report.fill(page, {"speed": [row, LINE]}) == page


def test_what_was_not_measured_says_so() -> None:
    assert report.fill(PAGE, {}).count("Not measured yet.") == 2


def test_a_peer_without_a_figure_has_a_dash() -> None:
    table = report.matrix({"a": {"speed": 1.0, "memory": 2.0}, "b": {"speed": 3.0}, "c": {"failed": "wrong bodies"}})
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()[2:]]
    assert cells[1] == ["memory", "2", "–", "–"]
    assert "wrong bodies" in table
