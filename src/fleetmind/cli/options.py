"""Options that several commands share, so that one word means one thing everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option("--home", help="Where state lives. Default: FLEETMIND_HOME, or ~/.local/share/fleetmind."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a configuration value, stronger than file and environment."),
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the model is ready.")]
Context = Annotated[str | None, typer.Option("--context", help="Context of one slot in tokens, such as 4096 or 8k.")]
Slots = Annotated[int | None, typer.Option("--slots", min=1, help="Calls that one replica answers at once.")]


def tokens(text: str | None) -> int | None:
    """The value of ``--context``. Raises typer.BadParameter."""
    from fleetmind.core.types import parse_tokens

    try:
        return None if text is None else parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--context") from None


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """The values of an option that takes NAME=VALUE and may be given often. Raises typer.BadParameter."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
        found[name.strip()] = value
    return found
