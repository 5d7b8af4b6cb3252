"""Writes what was measured into ``docs/benchmarks.md``: run after the benchmarks, never by hand.

The page keeps its own words; between two marks for each benchmark stands what ``results/`` holds, with the machine and
the date. A benchmark without a result says so.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import results

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- bench: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The page with every marked part replaced by its result."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        text = section(found[name]) if name in found else "Not measured yet.\n"
        return f"{match[1]}\n{text}\n{match[3]}"

    return MARK.sub(part, page)


def section(entries: list[dict[str, Any]]) -> str:
    """One benchmark: everything measured by peer, where there is that, then the rows, then where and when."""
    *rows, line = entries
    parts = [results.rows_table([results.Row(**each) for each in rows])]
    if "measured" in line:
        parts.insert(0, matrix(line["measured"]))
    parts.append(f"{line['machine']}. {line['date']}, {line['run']} run{_details(line)}.\n")
    return "\n\n".join(parts)


def matrix(measured: Mapping[str, Mapping[str, float | str]]) -> str:
    """What was measured of each peer, one line a figure."""
    names = list(measured)
    figures = list(dict.fromkeys(figure for values in measured.values() for figure in values))
    lines = [(figure, *(_cell(measured[name].get(figure)) for name in names)) for figure in figures]
    return results.table(("", *names), lines)


def _cell(value: float | str | None) -> str:
    return value if isinstance(value, str) else results.number(value)


def _details(line: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in line.items() if key not in ("machine", "date", "run", "measured")}
    for name, version in plain.pop("versions", {}).items():
        plain[name] = version
    return "".join(f", {key.replace('_', ' ')} {value}" for key, value in plain.items())


def main() -> int:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.RESULTS.glob("*.json"))}
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    results.say(f"{PAGE} shows {', '.join(found) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
