"""``fleetmind config`` and ``completion``: settings and where they came from, and the shell's help."""

import io
import os
from contextlib import redirect_stdout, suppress
from typing import Annotated, Any

import typer

from fleetmind.cli.exits import ServerRefused
from fleetmind.cli.options import Home, Json, Set, pairs
from fleetmind.cli.output import Output
from fleetmind.cli.presence import client_of, find, resolve_home

app = typer.Typer(help="Show settings and where their values come from.", no_args_is_help=True, rich_markup_mode=None)

SHELLS = ("bash", "zsh", "fish")
COMPLETE_VARIABLE = "_FLEETMIND_COMPLETE"


@app.command("show")
def show(
    name: Annotated[str | None, typer.Argument(help="One setting, such as server.port, or a section.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="What the next start would use, also while a server is running.")
    ] = False,
    set_: Set = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Show every setting, its value, and where the value came from. Passwords are hidden."""
    output, place = Output(is_json=json), resolve_home(home)
    server = None if local or set_ else find(place)
    values: list[dict[str, Any]]
    if server is not None:
        values = client_of(server).get("/api/config")["values"]
        output.say(f"As the running server (process {server.pid}) has them; --local shows the next start's.")
    else:
        from fleetmind.core.config import load

        values = list(load(place, environ=os.environ, flags=pairs(set_, "--set")).show())
    chosen = _chosen(name, values)

    def view() -> Any:
        from fleetmind.cli import views

        return views.configuration(chosen)

    output.result({"values": chosen}, view)


@app.command("example")
def example(json: Json = False) -> None:
    """Print an example fleetmind.toml: every setting with its help, at its default."""
    from fleetmind.core.config import example as text

    output = Output(is_json=json)
    if json:
        output.result({"text": text()}, str)
    else:
        output.write(text())


@app.command("path")
def path(home: Home = None, json: Json = False) -> None:
    """Print where the configuration file is, or would be."""
    file = resolve_home(home) / "fleetmind.toml"
    document = {"path": str(file), "exists": file.exists()}
    Output(is_json=json).result(document, lambda: str(file))


def completion(
    context: typer.Context,
    shell: Annotated[str | None, typer.Argument(help="bash, zsh or fish. Default: that of SHELL.")] = None,
    json: Json = False,
) -> None:
    """Print the script that lets the shell complete commands.

    \b
    fleetmind completion bash >> ~/.bashrc
    fleetmind completion zsh > ~/.zfunc/_fleetmind
    fleetmind completion fish > ~/.config/fish/completions/fleetmind.fish
    """
    chosen = shell or os.path.basename(os.environ.get("SHELL", ""))
    if chosen not in SHELLS:
        raise typer.BadParameter(f"{chosen!r} is not one of {', '.join(SHELLS)}")
    script = _script(context.find_root().command, chosen)
    output = Output(is_json=json)
    if json:
        output.result({"shell": chosen, "script": script}, str)
    else:
        output.write(script)


def _script(program: Any, shell: str) -> str:
    """What Typer prints when it is asked the documented way: by a variable of the program's own."""
    printed = io.StringIO()
    os.environ[COMPLETE_VARIABLE] = f"source_{shell}"
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            program.main(args=[], prog_name="fleetmind")
    finally:
        del os.environ[COMPLETE_VARIABLE]
    return printed.getvalue()


def _chosen(name: str | None, values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The setting with that name, or those of that section. Raises ServerRefused (not_found) with near names."""
    if name is None:
        return values
    chosen = [value for value in values if value["name"] == name or value["name"].startswith(f"{name}.")]
    if not chosen:
        import difflib

        near = tuple(difflib.get_close_matches(name, [value["name"] for value in values], n=3, cutoff=0.5))
        raise ServerRefused(
            f"There is no setting {name!r}.", code="not_found", hint="See all: fleetmind config show", near=near
        )
    return chosen
