"""The doctor's checks while no server runs.

Looks and changes nothing of its own accord, with one exception that a start would make too: a database of an older
Fleetmind is brought to the present tables when it is opened. It is opened only while this process holds the home's
lock, so that it never comes between a server and its database.
"""

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fleetmind.api import doctor
from fleetmind.api.schemas import CheckOut
from fleetmind.core.clock import SystemClock
from fleetmind.core.config import Configuration, Settings, load, mask
from fleetmind.core.errors import FleetmindError
from fleetmind.core.types import format_bytes
from fleetmind.fleet import packaged
from fleetmind.node.devices import open_devices
from fleetmind.node.engines.registry import engines
from fleetmind.store.database import Database
from fleetmind.store.journal import Journal

_ORDER = ("fail", "warn", "ok")
Status = Literal["ok", "warn", "fail"]


async def check_installation(home: Path) -> list[dict[str, Any]]:
    """All checks, worst first."""
    configuration, checks = _check_configuration(home)
    checks += await asyncio.to_thread(_check_home, home)
    checks.append(await asyncio.to_thread(_check_model, home))
    if configuration is not None:
        settings = configuration.settings
        checks.append(doctor.check_sqlite(settings.store.url))
        checks += await _check_store(home, settings)
        checks.append(doctor.check_exposure(settings.server.host))
        checks.append(_check_port(settings.server.host, settings.server.port))
        checks += await _check_devices(settings)
        checks.append(await _check_engines(settings))
    return [check.model_dump() for check in sorted(checks, key=lambda check: _ORDER.index(check.status))]


def _check_configuration(home: Path) -> tuple[Configuration | None, list[CheckOut]]:
    try:
        configuration = load(home, environ=os.environ, flags={})
    except FleetmindError as error:
        return None, [_check("configuration", "fail", error.message, error.hint)]
    changed = [name for name, origin in configuration.origins.items() if origin.source != "default"]
    return configuration, [_check("configuration", "ok", f"set: {', '.join(changed)}" if changed else "all defaults")]


def _check_home(home: Path) -> Sequence[CheckOut]:
    if not home.exists():
        return [_check("home", "ok", f"{home} will be made by the first start")]
    return doctor.check_home(home)


def _check_model(home: Path) -> CheckOut:
    name = f"packaged model {packaged.SMOLLM2.model}"
    try:
        path = packaged.verified(home / "models")
    except FleetmindError as error:
        return _check(name, "warn", error.message, error.hint)
    return _check(name, "ok", f"{format_bytes(path.stat().st_size)}, its hash is right")


async def _check_store(home: Path, settings: Settings) -> list[CheckOut]:
    url = settings.store.url or f"sqlite:///{home / 'fleetmind.db'}"
    if not settings.store.url and not (home / "fleetmind.db").exists():
        return [_check("database", "ok", "will be made by the first start")]
    with _locked(home) as is_ours:
        if not is_ours:
            words = "A server holds this home but can't be reached: it is starting, stopping, or another user's."
            return [_check("database", "warn", words, "Wait a moment, then try again.")]
        try:
            database = await Database.open(url)
        except FleetmindError as error:
            return [_check("database", "fail", mask(error.message), error.hint)]
        try:
            return [await doctor.check_database(database), await doctor.check_journal(Journal(database))]
        finally:
            await database.close()


@contextmanager
def _locked(home: Path) -> Iterator[bool]:
    """Hold the lock that a server on ``home`` holds; False where one does."""
    (home / "run").mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(home / "run" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _check_port(host: str, port: int) -> CheckOut:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                words = f"Port {port} of {host} is in use by another program."
                return _check("port", "fail", words, "Stop it, or choose another: fleetmind up --port PORT")
            words = f"Can't listen on {host}:{port}: {error.strerror or error}."
            return _check("port", "fail", words, "Check server.host and server.port.")
    return _check("port", "ok", f"{host}:{port} is free")


async def _check_devices(settings: Settings) -> list[CheckOut]:
    try:
        reader = open_devices(settings.node, SystemClock())
        devices = await reader.find()
        readings = await reader.read()
    except FleetmindError as error:
        return [_check("devices", "fail", error.message, error.hint)]
    names = {device.id: device.name + (" (simulated)" if device.is_simulated else "") for device in devices}
    faults = [reading for reading in readings if reading.fault]
    return [
        _check(f"device {names[reading.device_id]}", "fail", str(reading.fault), "Check its driver.")
        for reading in faults
    ] or [_check("devices", "ok", ", ".join(names.values()) or "none")]


async def _check_engines(settings: Settings) -> CheckOut:
    try:
        found = await engines(settings.node, os.environ)
    except FleetmindError as error:
        return _check("engines", "fail", error.message, error.hint)
    return _check("engines", "ok", ", ".join(sorted(found)))


def _check(name: str, status: Status, detail: str, fix: str = "") -> CheckOut:
    return CheckOut(name=name, status=status, detail=detail, fix=fix)
