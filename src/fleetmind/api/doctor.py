"""What can be wrong with an installation, and how to mend it.

Looks and never changes anything. Each check is one function that gives one CheckOut; those that need no running server
are also what ``fleetmind doctor`` runs when there is none.
"""

import asyncio
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from fleetmind.api.schemas import CheckOut
from fleetmind.core.config import Configuration
from fleetmind.core.errors import StoreError
from fleetmind.core.supervise import LoopState, Supervisor
from fleetmind.core.types import GIB, format_bytes
from fleetmind.fleet.inventory import Inventory
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of, sqlite_version
from fleetmind.store.journal import Journal

SQLITE_SAFE = (3, 51, 3)
"""The first SQLite without the fault by which several writers in WAL mode could corrupt a database ("the WAL-reset bug"
of sqlite.org/wal.html). We have exactly one writer, which is safe on older ones too."""


class Doctor:
    """The checks of a running server."""

    def __init__(
        self,
        *,
        home: Path,
        configuration: Configuration,
        database: Database,
        journal: Journal,
        inventory: Inventory,
        supervisor: Supervisor,
    ) -> None:
        self._home = home
        self._configuration = configuration
        self._database = database
        self._journal = journal
        self._inventory = inventory
        self._supervisor = supervisor

    async def check(self) -> list[CheckOut]:
        """All checks, worst first."""
        checks = [
            *await asyncio.to_thread(check_home, self._home),
            check_sqlite(self._configuration.settings.store.url),
            await check_database(self._database),
            await check_journal(self._journal),
            check_exposure(self._configuration.settings.server.host),
            *self._check_devices(),
            *self._check_models(),
            self._check_loops(),
        ]
        return sorted(checks, key=lambda check: _ORDER.index(check.status))

    def _check_devices(self) -> list[CheckOut]:
        views = self._inventory.snapshot().devices
        faults = [view for view in views if view.reading is not None and view.reading.fault]
        checks = [
            _fail(f"device {view.device.id}", str(view.reading and view.reading.fault), "Check the driver: nvidia-smi")
            for view in faults
        ]
        if not faults:
            names = ", ".join(f"{v.device.name}{' (simulated)' if v.device.is_simulated else ''}" for v in views)
            checks.append(_ok("devices", names or "none"))
        return checks

    def _check_models(self) -> list[CheckOut]:
        fleet = self._inventory.snapshot()
        checks = []
        for model in fleet.models.values():
            status = fleet.statuses.get(model.name)
            if model.name in fleet.ready or model.replicas_wanted == 0:
                checks.append(_ok(f"model {model.name}", "served" if model.name in fleet.ready else "not wanted"))
            elif status is not None and status.is_failed:
                checks.append(
                    _fail(f"model {model.name}", status.reason, "See `fleetmind logs` and `fleetmind status`.")
                )
            else:
                checks.append(_warn(f"model {model.name}", status.reason if status else "loading", "Wait a moment."))
        if not checks:
            checks.append(_warn("models", "The catalogue is empty.", "fleetmind models add smollm2-135m-instruct"))
        return checks

    def _check_loops(self) -> CheckOut:
        failing = [loop for loop in self._supervisor.health() if loop.state is LoopState.BACKING_OFF]
        if failing:
            words = "; ".join(f"{loop.name}: {loop.last_error}" for loop in failing)
            return _fail("loops", words, "See `fleetmind logs`; a loop that fails is started again.")
        return _ok("loops", f"{len(self._supervisor.health())} running")


def check_home(home: Path) -> Sequence[CheckOut]:
    """The state folder: private, writable, with room."""
    checks = []
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        checks.append(_warn("home", f"{home} can be read by others (mode {mode:o}).", f"chmod 700 {home}"))
    elif not os.access(home, os.W_OK):
        checks.append(_fail("home", f"{home} can't be written.", "Give it to the user that runs Fleetmind."))
    else:
        checks.append(_ok("home", str(home)))
    free = shutil.disk_usage(home).free
    if free < GIB:
        checks.append(_warn("disk", f"{format_bytes(free)} free at {home}.", "Make room, or move FLEETMIND_HOME."))
    else:
        checks.append(_ok("disk", f"{format_bytes(free)} free"))
    return checks


def check_sqlite(url: str) -> CheckOut:
    """The version of SQLite, if it is what stores."""
    version = sqlite_version()
    words = ".".join(map(str, version))
    if url.startswith("postgresql"):
        return _ok("sqlite", "not used: PostgreSQL is configured")
    if version < SQLITE_SAFE:
        return _warn(
            "sqlite",
            f"{words} has a known fault when several programs write; Fleetmind has one writer and is not affected.",
            "Let no other program write fleetmind.db.",
        )
    return _ok("sqlite", words)


async def check_database(database: Database) -> CheckOut:
    """Whether the database answers and is whole."""
    try:
        fault = await fault_of(database)
    except StoreError as error:
        return _fail("database", error.message, error.hint)
    if fault:
        return _fail("database", fault, "Stop the server and restore a copy of the home folder.")
    return _ok("database", "whole")


async def check_journal(journal: Journal) -> CheckOut:
    """Whether the journal's hash chain holds."""
    verdict = await journal.verify()
    if verdict.fault:
        return _fail("journal", str(verdict.fault), "Someone changed the database by hand, or the disk is failing.")
    return _ok("journal", f"{verdict.count} entries, head {verdict.head_hash[:16]}")


def check_exposure(host: str) -> CheckOut:
    """Who can reach the server."""
    if host in ("127.0.0.1", "::1", "localhost"):
        return _ok("exposure", "only this machine can reach the server")
    return _warn("exposure", f"{host} can be reached from other machines, with TLS.", "Make sure that is wanted.")


_ORDER = ("fail", "warn", "ok")


def _ok(name: str, detail: str) -> CheckOut:
    return CheckOut(name=name, status="ok", detail=detail, fix="")


def _warn(name: str, detail: str, fix: str) -> CheckOut:
    return CheckOut(name=name, status="warn", detail=detail, fix=fix)


def _fail(name: str, detail: str, fix: str) -> CheckOut:
    return CheckOut(name=name, status="fail", detail=detail, fix=fix)
