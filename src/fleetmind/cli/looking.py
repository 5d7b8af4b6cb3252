"""``fleetmind status``, ``logs`` and ``version``: what is going on."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetmind import __version__
from fleetmind.cli.exits import ServerRefused
from fleetmind.cli.options import Home, Json
from fleetmind.cli.output import Output
from fleetmind.cli.presence import connect, find, resolve_home
from fleetmind.core.clock import pause

if TYPE_CHECKING:
    from fleetmind.cli.client import Client

WATCH_INTERVAL_S = 1.0
FOLLOW_INTERVAL_S = 0.5
FOLLOW_LINES = 2000
"""How far back each look goes while following; more lines than this between two looks leave a gap."""


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every second until Ctrl-C.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Show the server, its devices, models and replicas."""
    from rich.live import Live

    from fleetmind.cli import views

    output, client = Output(is_json=json), connect(resolve_home(home))

    def look() -> dict[str, Any]:
        return {**client.get("/api/status"), "refusals": client.get("/api/placement")["refusals"]}

    if watch and not json and sys.stdout.isatty():
        with Live(views.status(look()), console=output.console(), screen=True, auto_refresh=False) as live:
            while True:
                pause(WATCH_INTERVAL_S)
                live.update(views.status(look()), refresh=True)
    while True:
        found = look()
        output.result(found, partial(views.status, found))
        if not watch:
            return
        pause(WATCH_INTERVAL_S)


def logs(
    replica: Annotated[
        str | None,
        typer.Option("--replica", help="A replica's engine instead of the server: its id, or how it begins."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=FOLLOW_LINES, help="How many lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Show the last lines of the server's log, or of a replica's engine.

    Without a running server the file of the last one is shown.
    """
    output, place = Output(is_json=json), resolve_home(home)
    server = find(place)
    if server is None and replica is None:
        found = _last_lines(place / "logs" / "server.log", lines)
        output.say("No server is running; these are the last one's lines.")
    else:
        client = connect(place)
        path = "/api/logs" if replica is None else f"/api/replicas/{_replica_id(replica, client)}/log"
        if follow:
            _print(output, followed(lambda: client.get(path, lines=FOLLOW_LINES)["lines"], first=lines))
            return
        found = client.get(path, lines=lines)["lines"]
    if json:
        output.result({"lines": found}, str)
    else:
        _print(output, iter(found))


def version(json: Json = False) -> None:
    """Print the version."""
    from platform import python_version

    document = {"version": __version__, "python": python_version()}
    Output(is_json=json).result(document, lambda: f"fleetmind {__version__} (Python {python_version()})")


def followed(look: Callable[[], list[str]], *, first: int, wait: Callable[[float], None] = pause) -> Iterator[str]:
    """The last ``first`` lines, then every new one, for ever."""
    seen = look()
    yield from seen[-first:]
    while True:
        wait(FOLLOW_INTERVAL_S)
        now = look()
        yield from new_lines(seen, now)
        seen = now


def new_lines(before: list[str], after: list[str]) -> list[str]:
    """What ``after`` has behind the end of ``before``, both being the ends of one growing file.

    The longest end of ``before`` that ``after`` begins with is what they share; where nothing is shared, all is new.
    """
    for shared in range(min(len(before), len(after)), 0, -1):
        if before[-shared:] == after[:shared]:
            return after[shared:]
    return after


def _print(output: Output, lines: Iterator[str]) -> None:
    for line in lines:
        output.write(line.rstrip("\n") + "\n")


def _last_lines(path: Any, count: int) -> list[str]:
    from fleetmind.node.logs import read_tail

    return read_tail(path, count)


def _replica_id(wanted: str, client: "Client") -> str:
    """The one replica whose id begins with ``wanted``. Raises ServerRefused (not_found, conflict)."""
    ids = [replica["id"] for replica in client.get("/api/replicas")["replicas"]]
    matches = [wanted] if wanted in ids else [one for one in ids if one.startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    code, what = ("conflict", "more than one") if matches else ("not_found", "no")
    import difflib

    raise ServerRefused(
        f"There is {what} replica {wanted!r}.",
        code=code,
        hint="See their ids: fleetmind status",
        near=tuple(matches or difflib.get_close_matches(wanted, ids, n=3)),
    )
