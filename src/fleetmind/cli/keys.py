"""``fleetmind keys``: who may call the endpoint."""

from typing import Annotated, Any

import typer

from fleetmind.cli.exits import ServerRefused
from fleetmind.cli.options import Home, Json
from fleetmind.cli.output import Output
from fleetmind.cli.presence import connect, resolve_home

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True, rich_markup_mode=None)

DAY_S = 86400
_SPANS_S = {"m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
SCOPES = ("infer", "read", "metrics", "admin")


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for, such as 'notebook'.")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="What it may do: infer (default), read, metrics or admin. May be given often."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Only this model. May be given often. Default: all.")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="Lifetime, such as 12h, 30d or 4w.")] = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Make a key. Its text is printed once and stored nowhere."""
    wanted: dict[str, object] = {"name": name, "scopes": _scopes(scope), "models": model or []}
    if expires is not None:
        wanted["expires_in_s"] = seconds(expires)
    output = Output(is_json=json)
    made = connect(resolve_home(home)).post("/api/keys", wanted)
    if json:
        output.result(made, str)
    else:
        output.say(f"Key {made['id']} ({name}) may {', '.join(made['scopes'])}. It is shown this once:")
        output.write(made["key"] + "\n")


@app.command("ls")
def ls(home: Home = None, json: Json = False) -> None:
    """List all keys, without their text."""
    found = connect(resolve_home(home)).get("/api/keys")

    def view() -> Any:
        from fleetmind.cli import views

        return views.keys(found["keys"])

    Output(is_json=json).result(found, view)


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, or its name where only one key has it.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """End a key at once."""
    client = connect(resolve_home(home))
    chosen = choose(key, client.get("/api/keys")["keys"])
    client.delete("/api/keys", chosen["id"])
    Output(is_json=json).result({"revoked": chosen["id"]}, lambda: f"Revoked {chosen['id']} ({chosen['name']}).")


def choose(wanted: str, keys: list[dict[str, Any]]) -> dict[str, Any]:
    """The one living key with that id or name. Raises ServerRefused (not_found, conflict)."""
    matches = [key for key in keys if key["id"] == wanted]
    matches = matches or [key for key in keys if key["name"] == wanted and key["revoked_at_s"] is None]
    if len(matches) > 1:
        ids = ", ".join(key["id"] for key in matches)
        raise ServerRefused(f"{len(matches)} keys are named {wanted!r}: {ids}.", code="conflict", hint="Give the id.")
    if not matches:
        import difflib

        names = [name for key in keys if key["revoked_at_s"] is None for name in (key["id"], key["name"])]
        near = tuple(difflib.get_close_matches(wanted, names, n=3))
        raise ServerRefused(
            f"There is no key {wanted!r}.", code="not_found", hint="List them: fleetmind keys ls", near=near
        )
    return matches[0]


def seconds(text: str) -> int:
    """Seconds from ``12h``, ``30d`` or ``4w``. Raises typer.BadParameter."""
    number, unit = text.strip()[:-1], text.strip()[-1:].lower()
    if not number.isdecimal() or int(number) == 0 or unit not in _SPANS_S:
        raise typer.BadParameter(f"{text!r} is not a lifetime; write for example 12h, 30d or 4w")
    return int(number) * _SPANS_S[unit]


def _scopes(given: list[str] | None) -> list[str]:
    """The scopes, also where they were given as one list with commas. Raises typer.BadParameter."""
    scopes = [scope.strip() for text in given or ["infer"] for scope in text.split(",") if scope.strip()]
    for scope in scopes:
        if scope not in SCOPES:
            raise typer.BadParameter(f"{scope!r} is not one of {', '.join(SCOPES)}", param_hint="--scope")
    return scopes
