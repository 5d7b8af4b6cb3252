"""What a benchmark found: rows with a ratio and a verdict, printed as a table and written as JSON.

Only measured values become rows. A target is judged here and nowhere else, so that the table, the file and the
documentation cannot disagree.
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Target:
    """What a row must reach: ``of`` ("ours" or "ratio") at least or at most ``limit``."""

    of: str
    relation: str
    limit: float

    def met(self, ours: float, ratio: float | None) -> bool | None:
        """Whether it is reached; None when the value it speaks of was not measured."""
        value = ours if self.of == "ours" else ratio
        if value is None:
            return None
        return value >= self.limit if self.relation == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.of} {self.relation} {self.limit:g}"


def at_least(limit: float, of: str = "ratio") -> Target:
    return Target(of, ">=", limit)


def at_most(limit: float, of: str = "ours") -> Target:
    return Target(of, "<=", limit)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of ours, and the peer's in the same run where there is one.

    ``ratio`` is ours / baseline; where both were measured in rounds, the median of the rounds' ratios.
    """

    what: str
    unit: str
    ours: float
    baseline: float | None = None
    baseline_name: str | None = None
    ratio: float | None = None
    target: str | None = None
    met: bool | None = None


def row(
    what: str,
    unit: str,
    ours: float,
    *,
    baseline: float | None = None,
    baseline_name: str | None = None,
    ratio: float | None = None,
    target: Target | None = None,
) -> Row:
    """A row with its ratio and verdict worked out. A baseline of zero gives no ratio rather than an infinite one."""
    if ratio is None and baseline:
        ratio = ours / baseline
    return Row(
        what=what,
        unit=unit,
        ours=rounded(ours),
        baseline=None if baseline is None else rounded(baseline),
        baseline_name=baseline_name,
        ratio=None if ratio is None else rounded(ratio),
        target=None if target is None else str(target),
        met=None if target is None else target.met(ours, ratio),
    )


def paired(
    what: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    baseline_name: str,
    target: Target | None = None,
) -> Row:
    """A row from rounds that measured both side by side. ``ours[i]`` and ``theirs[i]`` are of one round.

    What disturbs a machine for seconds disturbs both of a round, so the rounds' ratios agree better than their medians.
    """
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
    return row(
        what,
        unit,
        median(ours),
        baseline=median(theirs),
        baseline_name=baseline_name,
        ratio=median(ratios) if ratios else None,
        target=target,
    )


def rounded(value: float) -> float:
    """Four significant digits: more would claim a precision that no run here has."""
    return float(f"{value:.4g}")


def median(values: Sequence[float]) -> float:
    """The middle of the rounds; ValueError for none, because a figure without a measurement is not a figure."""
    if not values:
        raise ValueError("no rounds were measured")
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0 to 1) of ``values`` do not exceed (nearest rank)."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[min(len(ordered), int(rank)) - 1]


def machine() -> str:
    """The machine in words: processor, cores this process may use, memory, kernel, Python. No host name."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def is_full() -> bool:
    """``FULL=1`` asks for the long run whose figures are published."""
    return os.environ.get("FULL", "") not in ("", "0")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up, numbers to the right."""
    widths = [max(len(cells[i]) for cells in (headings, *rows)) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(headings), rule, *(line(cells) for cells in rows)])


def rows_table(rows: Sequence[Row]) -> str:
    """The rows as a person reads them."""
    return table(
        ("what", "unit", "Fleetmind", "beside", "its figure", "ratio", "target", "met"),
        [
            (
                each.what,
                each.unit,
                number(each.ours),
                each.baseline_name or "–",
                number(each.baseline),
                number(each.ratio),
                each.target or "–",
                {True: "yes", False: "NO", None: "–"}[each.met],
            )
            for each in rows
        ],
    )


def number(value: float | None) -> str:
    """A figure in at most four digits, thousands set apart; a dash when it was not measured."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"


def publish(name: str, rows: Sequence[Row], *, about: Mapping[str, object]) -> Path:
    """Print the rows and write them to ``results/<name>.json``: the rows, then one line on machine, date and run."""
    line = {
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": "full" if is_full() else "short",
        **about,
    }
    print(rows_table(rows))
    print(f"\n{line['machine']}; {line['date']}; {line['run']} run")
    return write(RESULTS / f"{name}.json", rows, line)


def write(path: Path, rows: Sequence[Row], line: Mapping[str, object]) -> Path:
    """Write one JSON object a line, so that two runs can be compared with diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [json.dumps(entry, ensure_ascii=False) for entry in (*(asdict(each) for each in rows), line)]
    path.write_text("[\n  " + ",\n  ".join(entries) + "\n]\n", encoding="utf-8")
    return path


def say(text: str) -> None:
    """Progress for a person; the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)
