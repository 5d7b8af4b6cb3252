"""Whether a server runs on a home, and how to reach it.

A server leaves ``run/server.json`` (mode 0600) with its address, its process and a token made for this start. The file
alone proves nothing: a killed server leaves it behind. Invariant: a server counts as running only while a process with
that pid *and* that start time lives.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleetmind.cli.exits import Unreachable
from fleetmind.core.home import home_from

if TYPE_CHECKING:
    from fleetmind.cli.client import Client

SERVER_FILE_BYTES_MAX = 65536
START_TOLERANCE_S = 2.0
"""The kernel counts a start in ticks since boot; the wall clock it is turned into may be adjusted meanwhile."""


@dataclass(frozen=True, slots=True)
class Running:
    """A running server. The token never shows in a repr."""

    url: str
    pid: int
    started_at_s: float
    token: str = field(repr=False)
    certificate: str = ""


def resolve_home(given: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The home a command works on: ``--home``, else FLEETMIND_HOME, else the default."""
    return home_from({**environ, "FLEETMIND_HOME": str(given)} if given is not None else environ)


def find(home: Path) -> Running | None:
    """The server that runs on ``home``, None if there is none."""
    running = _read(home / "run" / "server.json")
    return running if running is not None and lives(running.pid, running.started_at_s) else None


def require(home: Path) -> Running:
    """The server that runs on ``home``. Raises Unreachable."""
    running = find(home)
    if running is None:
        raise Unreachable(f"No server is running on {home}.", hint="Start it with: fleetmind up")
    return running


def connect(home: Path) -> "Client":
    """A client of the server that runs on ``home``. Raises Unreachable."""
    return client_of(require(home))


def client_of(server: Running) -> "Client":
    """A client of ``server``. What HTTP needs is imported here, so that help and usage errors don't wait for it."""
    from fleetmind.cli.client import Client

    return Client(server)


def lives(pid: int, started_at_s: float) -> bool:
    """Whether the process with this pid is the one that started then."""
    import psutil

    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - started_at_s) <= START_TOLERANCE_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _read(path: Path) -> Running | None:
    try:
        if path.stat().st_size > SERVER_FILE_BYTES_MAX:
            return None
        document = json.loads(path.read_bytes())
        return Running(
            url=str(document["url"]),
            pid=int(document["pid"]),
            started_at_s=float(document["started_at_s"]),
            token=str(document["token"]),
            certificate=str(document.get("tls_certificate", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none, or not one of ours: then nothing that we could speak to is running
