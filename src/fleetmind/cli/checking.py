"""``fleetmind doctor``: what is wrong with this installation, and how to mend it.

A running server is asked, since it alone may touch its database. Without one, ``cli/offline.py`` looks.
"""

from typing import Any

import typer

from fleetmind.cli.exits import Exit
from fleetmind.cli.options import Home, Json
from fleetmind.cli.output import Output
from fleetmind.cli.presence import client_of, find, resolve_home


def doctor(home: Home = None, json: Json = False) -> None:
    """Look at everything that can be wrong, and say how to mend it. Ends with 1 if something is."""
    output, place = Output(is_json=json), resolve_home(home)
    server = find(place)
    checks: list[dict[str, Any]]
    if server is not None:
        checks = client_of(server).get("/api/doctor")["checks"]
    else:
        import asyncio

        from fleetmind.cli.offline import check_installation

        output.say("No server is running; looking at what a start would find.")
        checks = asyncio.run(check_installation(place))

    def view() -> Any:
        from fleetmind.cli import views

        return views.doctor(checks)

    output.result({"checks": checks}, view)
    if any(check["status"] == "fail" for check in checks):
        raise typer.Exit(Exit.FAILURE)
