"""The parts of the documentation that are made from the code. ``make docs`` writes them; tests compare them.

A generated part stands between two comments, ``<!-- made by make docs: NAME -->`` and ``<!-- end of NAME -->``; the
rest of a file is written by hand.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

import typer

from fleetmind.api import manage, openai
from fleetmind.api.routes import access_of
from fleetmind.cli.main import app
from fleetmind.core.config import example, leaves, load
from fleetmind.core.settings import ServerSettings
from fleetmind.node import protocol

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "fleetmind.example.toml"
CALLS = {
    "/v1/models": "The models this key may call.",
    "/v1/chat/completions": "A chat answer, whole or streamed.",
    "/v1/completions": "A continued text, whole or streamed.",
    "/v1/embeddings": "Vectors of texts, from a model that makes them.",
}
"""What the routes do that are bare ASGI functions and have no docstring to show."""
EVERYWHERE = frozenset({"--home", "--json", "--help"})
"""Options that are described once for all commands."""
PAGES = {"/": "The page: live status, and how to connect.", "/static/{name}": "The page's files.",
         "/api/openapi.json": "The OpenAPI document of everything below `/api`."}  # fmt: skip


def state_tables() -> Mapping[str, tuple[type[Enum], Mapping[Any, frozenset[Any]]]]:
    """Every state machine's table by its name, with the enumeration of its states."""
    return {"replica": (protocol.ReplicaState, protocol.TRANSITIONS)}


def states() -> str:
    """The state machines as diagrams."""
    parts = []
    for name, (kind, table) in state_tables().items():
        lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(kind)).value}"]
        lines += [f"    {state.value} --> {after.value}" for state in kind for after in kind if after in table[state]]
        lines += [f"    {state.value} --> [*]" for state in kind if not table[state]]
        parts.append(f"### {name}\n\n" + "\n".join([*lines, "```"]))
    return "\n\n".join(parts)


def settings() -> str:
    """Every setting, a table per section."""
    parts: list[str] = []
    section = ""
    for leaf in leaves():
        of = leaf.name.partition(".")[0]
        if of != section:
            section = of
            parts += [f"\n### {section}\n", "| name | default | accepts | meaning |", "|---|---|---|---|"]
        unit = f" ({leaf.unit})" if leaf.unit else ""
        cells = (f"`{leaf.name}`<br>`{leaf.variable}`", f"`{_shown(leaf.default)}`{unit}", leaf.accepts, leaf.help)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts).strip()


def commands() -> str:
    """Every command with its arguments and options."""
    return "\n\n".join(_described(path, command) for path, command in command_tree())


def routes() -> str:
    """Every route, who may use it, and what it does."""
    lines = ["| route | scope | what |", "|---|---|---|"]
    lines += [f"| `{method} {path}` | {scope} | {what} |" for method, path, scope, what in route_table()]
    return "\n".join(lines)


def command_tree() -> list[tuple[str, Any]]:
    """All commands that do something, by what is typed, such as ``models add``."""
    found: list[tuple[str, Any]] = []

    def walk(prefix: str, command: Any) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append((prefix.strip(), command))
        for name, child in (children or {}).items():
            walk(f"{prefix} {name}", child)

    walk("", typer.main.get_command(app))
    return found


def route_table() -> list[tuple[str, str, str, str]]:
    """Method, path, scope and meaning of every route, read from the application itself."""
    nothing = cast(Any, None)
    defaults = load(Path("/"), environ={}, flags={})
    parts = manage.Parts(**{**{field.name: nothing for field in fields(manage.Parts)}, "configuration": defaults})
    built = manage.build(parts, list(openai.routes(nothing, nothing, ServerSettings())))
    found = []
    for route in built.router.routes:
        path, endpoint = getattr(route, "path", ""), getattr(route, "endpoint", None)
        right = access_of(route).right
        what = CALLS.get(path) or PAGES.get(path) or _first(inspect.getdoc(endpoint))
        methods = sorted(set(getattr(route, "methods", None) or ()) - {"HEAD", "OPTIONS"})
        found += [(method, path, right.value if right else "everybody", what) for method in methods]
    return sorted(found, key=lambda row: (not row[1].startswith("/v1"), row[1], row[0]))


GENERATED: Mapping[tuple[str, str], Callable[[], str]] = {
    ("states.md", "states"): states,
    ("configuration.md", "settings"): settings,
    ("command-line.md", "commands"): commands,
    ("http.md", "routes"): routes,
}
"""Which part of which file is made by what."""


def pattern(name: str) -> re.Pattern[str]:
    """Where the part ``name`` stands in its file."""
    begin, end = re.escape(f"<!-- made by make docs: {name} -->"), re.escape(f"<!-- end of {name} -->")
    return re.compile(f"({begin}\n)(.*?)(\n{end})", re.DOTALL)


def write() -> None:
    """Bring all generated parts up to date."""
    EXAMPLE.write_text(example(), encoding="utf-8")
    for (file, name), make in GENERATED.items():
        text = (DOCS / file).read_text(encoding="utf-8")
        place = pattern(name).search(text)
        assert place, f"docs/{file} has no place for {name}"
        whole = text[: place.start(2)] + f"\n{make()}\n" + text[place.end(2) :]
        (DOCS / file).write_text(whole, encoding="utf-8")


def _described(path: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not EVERYWHERE & set(one.opts)]
    usage = " ".join([f"fleetmind {path}", *(_usage(one) for one in arguments), "[OPTIONS]"])
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b")
    lines = [f"### fleetmind {path}", "", text.strip(), "", "```", usage, "```", ""]
    if examples:
        lines += ["For example:", "", "```bash", examples.strip(), "```", ""]
    lines += [f"- `{_usage(one)}` {one.help or ''}".rstrip() for one in arguments]
    lines += [f"- {_spelled(one)}: {one.help or ''}".rstrip() for one in options]
    return "\n".join(lines).rstrip()


def _first(text: str | None) -> str:
    return (text or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")


def _usage(argument: Any) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _spelled(option: Any) -> str:
    spelled: Iterator[str] = iter([*option.opts, *option.secondary_opts])
    return ", ".join(f"`{one}`" for one in spelled)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ", ".join(map(str, default)) or "empty"
    return str(default) if default != "" else "empty"


if __name__ == "__main__":
    write()
