"""The example configuration is the code's own, and all of it is documented."""

import tomllib
from pathlib import Path

from tests.tidy.generated import DOCS, EXAMPLE

from fleetmind.core.config import example, leaves, load


def test_the_example_file_is_what_the_code_prints() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == example(), "run: make docs"


def test_the_example_loads_as_it_is_and_with_every_line_taken_up(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    file = tmp_path / "fleetmind.toml"
    file.write_text(text)
    assert {origin.source for origin in load(tmp_path, environ={}, flags={}).origins.values()} == {"default"}
    taken_up = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    assert set(tomllib.loads(taken_up)) == {leaf.name.partition(".")[0] for leaf in leaves()}
    file.write_text(taken_up)
    configuration = load(tmp_path, environ={}, flags={})
    assert {name: origin.source for name, origin in configuration.origins.items()} == {
        leaf.name: "file" for leaf in leaves()
    }
    assert configuration.settings == load(tmp_path / "nowhere", environ={}, flags={}).settings


def test_every_setting_and_its_variable_are_documented() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    missing = [leaf.name for leaf in leaves() if f"`{leaf.name}`" not in text or f"`{leaf.variable}`" not in text]
    assert missing == []
