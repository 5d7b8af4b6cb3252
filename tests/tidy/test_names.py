"""Names and docstrings: one word per idea, and every public thing says what it is."""

import ast
import re
from collections.abc import Iterator

import pytest
from tests.tidy.sources import SOURCES, Module, modules

import fleetmind

EMPTY_WORDS = {"manager", "service", "helper", "helpers", "util", "utils", "common", "base", "misc"}
LINES_MAX = 500
OUTERMOST = {
    "fleetmind.api.gate": "a request",
    "fleetmind.core.supervise": "a loop",
    "fleetmind.node.daemon": "a replica's life",
    "fleetmind.store.writer": "the writer's thread",
}
"""Where what nobody foresaw may end, and what ends with it."""


def words(name: str) -> set[str]:
    """The words of a module's or a class's name."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def public(module: Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_every_public_name_says_what_it_is(module: Module) -> None:
    if module.path.name == "__init__.py":
        return
    assert module.docstring, f"{module.name} has no docstring"
    silent = [node.name for node in public(module) if not ast.get_docstring(node)]
    assert silent == [], f"{module.name}: no docstring"


def test_inner_packages_have_empty_files_of_their_own() -> None:
    written = {
        module.name
        for module in modules()
        if module.path.name == "__init__.py" and module.path.parent.parent != SOURCES and module.text.strip()
    }
    assert written == set()


def test_the_root_names_the_public_api() -> None:
    assert all(hasattr(fleetmind, name) for name in fleetmind.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fleetmind.__version__)


def test_no_name_uses_a_word_that_says_nothing() -> None:
    empty = [
        f"{module.name}.{name}"
        for module in modules()
        for name in (module.name.rpartition(".")[2], *(n.name for n in public(module) if isinstance(n, ast.ClassDef)))
        if words(name) & EMPTY_WORDS
    ]
    assert empty == []


def test_modules_stay_short_enough_to_hold_one_noun() -> None:
    long = {module.name: lines for module in modules() if (lines := module.text.count("\n")) >= LINES_MAX}
    assert long == {}


def test_nothing_but_the_command_line_and_engine_programs_prints() -> None:
    printing = {
        module.name
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    allowed = ("fleetmind.cli.", "fleetmind.node.engines.fake_server", "fleetmind.node.engines.llamacpp_child")
    assert {name for name in printing if not name.startswith(allowed)} == set()


def test_broad_handlers_stand_only_at_the_outermost_edges() -> None:
    broad = {
        module.name
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
    }
    assert broad <= set(OUTERMOST), "a broad handler belongs to the supervisor and the outermost handlers alone"
