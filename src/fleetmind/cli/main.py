"""The command ``fleetmind``: all commands in one place, and the outermost handler of what they raise.

Commands speak to a running server over HTTP and never to its database. Each module is light to import; what is heavy
(Rich, asyncio, the server itself) is imported by the command that needs it, so that help appears at once.
"""

import os
import sys
from typing import Annotated

import typer

from fleetmind import __version__
from fleetmind.cli import catalogue, checking, configuring, keys, looking, serving, talking
from fleetmind.cli.exits import Exit, exit_of
from fleetmind.cli.output import Output
from fleetmind.core.errors import FleetmindError

app = typer.Typer(
    name="fleetmind",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"fleetmind {__version__}")
        raise typer.Exit


@app.callback()
def fleetmind(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The GPUs and CPUs you own, as one AI service behind one OpenAI-compatible endpoint.

    Start with: fleetmind up. Then: fleetmind ask "Say hello."
    """


app.command("up")(serving.up)
app.command("down")(serving.down)
app.command("status")(looking.status)
app.command("ask")(talking.ask)
app.command("chat")(talking.chat)
app.add_typer(catalogue.app, name="models")
app.command("fit")(catalogue.fit)
app.add_typer(keys.app, name="keys")
app.command("logs")(looking.logs)
app.add_typer(configuring.app, name="config")
app.command("doctor")(checking.doctor)
app.command("completion")(configuring.completion)
app.command("version")(looking.version)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    output = Output(is_json="--json" in arguments)
    try:
        app(arguments, prog_name="fleetmind")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except FleetmindError as error:
        output.fail(error)
        return exit_of(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    return Exit.OK


def main() -> None:
    """The entry point."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read us has gone, as `fleetmind logs | head` does. Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.FAILURE
    sys.exit(code)


if __name__ == "__main__":
    main()
