"""Documentation against code: what it shows exists, and what exists is shown."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.tidy.generated import DOCS, GENERATED, command_tree, pattern, route_table
from tests.tidy.sources import ROOT, modules

from fleetmind.node.engines.fake_knobs import Knobs

PAGES = sorted([ROOT / "README.md", *ROOT.glob("requirements/*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = {"", "bash", "sh", "console"}
COMMANDS: dict[str, Any] = dict(command_tree())
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    return FENCE.sub("", text)


def shown_commands(text: str) -> Iterator[str]:
    """Every ``fleetmind …`` that a page shows, in fences and between backticks."""
    for language, block in FENCE.findall(text):
        if language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                yield from re.findall(r"(?:^|[|&$(] ?)\s*(fleetmind [^|&>)]+)", line.partition(" #")[0])
    yield from re.findall(r"`(fleetmind [^`]+)`", prose(text))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_that_a_page_shows_exists_with_its_options(page: Path) -> None:
    wrong = [shown for shown in shown_commands(page.read_text(encoding="utf-8")) if not exists(shown)]
    assert wrong == []


def test_every_command_that_a_message_of_the_code_names_exists() -> None:
    """Hints say what to type next; a hint that names no command is worse than none."""
    wrong = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w./-])fleetmind ([a-z][\w-]*)(?: ([a-z][\w-]*))?", node.value)
                wrong += [f"{module.name}: fleetmind {a} {b}" for a, b in named if not is_command(a, b)]
    assert wrong == []


def is_command(first: str, second: str) -> bool:
    return first in COMMANDS or (first in GROUPS and (not second or f"{first} {second}" in COMMANDS))


def exists(shown: str) -> bool:
    words = shlex.split(shown, comments=True)[1:]
    if not words or words[0].startswith("-"):
        return set(words) <= {"--help", "-h", "--version", "[OPTIONS]"}
    name = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    if name in GROUPS:
        return True
    command = COMMANDS.get(name)
    if command is None:
        return False
    known = {"--help", "-h"} | {
        spelled for option in command.params for spelled in (*option.opts, *option.secondary_opts)
    }
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return set(options) <= known


def test_every_command_can_answer_in_json() -> None:
    silent = [name for name, command in COMMANDS.items() if "--json" not in {o for p in command.params for o in p.opts}]
    assert silent == []


def test_every_command_option_and_argument_says_what_it_is() -> None:
    for name, command in COMMANDS.items():
        assert command.help, name
        assert [one.name for one in command.params if not one.help] == [], name


def test_every_route_that_a_page_names_exists() -> None:
    routes = {(method, re.compile(re.sub(r"\{\w+\}", "[^/]+", path))) for method, path, _, _ in route_table()}
    wrong = []
    for page in PAGES:
        for method, path in re.findall(
            r"\b(GET|POST|PUT|PATCH|DELETE) (/[\w/{}.-]*)", page.read_text(encoding="utf-8")
        ):
            if not any(method == known and pattern.fullmatch(path.rstrip(".")) for known, pattern in routes):
                wrong.append(f"{page_id(page)}: {method} {path}")
    assert wrong == []


def test_every_knob_of_the_fake_engine_is_described() -> None:
    text = (DOCS / "simulation.md").read_text(encoding="utf-8")
    assert [field.name for field in fields(Knobs) if f"| `{field.name}` |" not in text] == []


def test_every_route_says_what_it_does() -> None:
    assert [f"{method} {path}" for method, path, _, what in route_table() if not what] == []


@pytest.mark.parametrize(("file", "name"), sorted(GENERATED))
def test_generated_parts_are_current(file: str, name: str) -> None:
    found = pattern(name).search((DOCS / file).read_text(encoding="utf-8"))
    assert found, f"docs/{file} has no part {name}"
    assert found[2].strip() == GENERATED[file, name](), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_examples_compile_and_import_what_exists(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(block, page_id(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page.read_text(encoding="utf-8")))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    """Between backticks and with a folder, as ``gateway/dispatch.py``: below the root, the package or the page."""
    roots = (ROOT, ROOT / "src" / "fleetmind", DOCS, page.parent)
    named = re.findall(
        r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|toml|txt|js|html|lua))`", prose(page.read_text(encoding="utf-8"))
    )
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_functions_that_a_page_names_exist(page: Path) -> None:
    """Between backticks as ``module.py: name``: the way of a call names files and functions."""
    by_path = {str(module.path.relative_to(ROOT / "src" / "fleetmind")): module for module in modules()}
    for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", page.read_text(encoding="utf-8")):
        assert file in by_path, file
        defined = {
            node.name
            for node in ast.walk(by_path[file].tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert set(name.split(".")) <= defined, f"{file}: {name}"
