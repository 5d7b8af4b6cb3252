"""A server in a process of its own, there to be killed: started by the real command, killed without warning, and
searched for what it left behind.

Waits for other processes are bounded polls here: no event tells this process that something changed in one of theirs.
"""

import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import aiohttp
import psutil
from tests.flow.service import Service

from fleetmind.app import Started
from fleetmind.core.clock import Dice, SystemClock

PATIENCE_S = 90.0
"""The longest wait for anything: a machine that runs tests may be busy with much else."""
SETTINGS = {
    "models.preload": "",
    "models.fetch_packaged": "false",
    "fleet.reconcile_interval_s": "0.1",
    "fleet.restart_backoff_s": "0.02",
    "fleet.restart_backoff_s_max": "0.1",  # it is killed again and again, which is no reason to pause here
    "node.probe_interval_s": "0.5",
    "node.stop_grace_s": "2",
    "node.llama_server": "off",
    "gateway.usage_flush_s": "0.1",
}

clock = SystemClock()


def roll_dice() -> Dice:
    """Chance from CHAOS_SEED, or from a new seed. It is printed: with it the same kills are tried again."""
    dice = Dice(int(os.environ.get("CHAOS_SEED", "0")) or None)
    print(f"CHAOS_SEED={dice.seed}")
    return dice


@dataclass(frozen=True)
class Trace:
    """A process that was seen. A pid alone could be another's by now."""

    pid: int
    created_at_s: float

    @property
    def lives(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created_at_s and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def kill(self) -> None:
        if self.lives:
            os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Life:
    """A server from its start until it is killed. ``ready_s`` counts from the command to its line that it is ready."""

    process: subprocess.Popen[bytes]
    service: Service
    ready_s: float
    notes: tuple[str, ...]

    async def engines(self, model: str | None = None) -> set[Trace]:
        """The processes of its replicas."""
        answer = await self.service.ask("GET", "/api/replicas")
        found = set()
        for replica in answer.json()["replicas"]:
            if replica["pid"] is not None and model in (None, replica["model"]):
                with suppress(psutil.NoSuchProcess):
                    found.add(Trace(replica["pid"], psutil.Process(replica["pid"]).create_time()))
        return found


class Home:
    """A home, and the servers that live and die on it, one after the other. Make it with ``open_home``."""

    def __init__(self, path: Path, session: aiohttp.ClientSession, port: int, settings: dict[str, str]) -> None:
        self.path = path
        self.seen: set[Trace] = set()
        self.restarts_s: list[float] = []
        self._session = session
        self._settings = SETTINGS | {"server.port": str(port)} | settings
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start a server and return at once."""
        assert self._process is None, "one server at a time"
        flags = [part for name, value in self._settings.items() for part in ("--set", f"{name}={value}")]
        command = [sys.executable, "-m", "fleetmind.cli.main", "up", "--json", "--home", str(self.path), *flags]
        # Variables of these tests, and settings of whoever runs them, are none of the server's.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FLEETMIND_")}
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=environ
            )
        self.seen.add(Trace(self._process.pid, psutil.Process(self._process.pid).create_time()))
        return self._process

    async def start(self) -> Life:
        """Start a server and return when it is ready."""
        began_s = clock.monotonic_s()
        process = self.spawn()
        assert process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), PATIENCE_S)
        assert line, f"the server ended before it was ready: {self._said.read_text()[-2000:]}"
        ready_s = clock.monotonic_s() - began_s
        self.restarts_s.append(ready_s)
        said = json.loads(line)
        started = Started(said["url"], said["key"], Path(said["token_file"]), (), (), said["ready_s"], ())
        return Life(process, Service(self.path, started, self._session), ready_s, tuple(said["notes"]))

    async def until_locked(self) -> None:
        """Return when the server that starts has got as far as its lock."""
        assert self._process is not None
        process, lock = psutil.Process(self._process.pid), str(self.path / "run" / "lock")
        async with asyncio.timeout(PATIENCE_S):
            while all(file.path != lock for file in process.open_files()):
                await asyncio.sleep(0.01)

    def kill(self, *others: Trace) -> None:
        """kill -9, of ``others`` too, and return when the server is gone."""
        assert self._process is not None
        self._process.kill()
        for other in others:
            other.kill()
        self.reap()

    def reap(self) -> int:
        """Wait for the end of the server; its exit code."""
        assert self._process is not None
        assert self._process.stdout is not None
        code = self._process.wait(PATIENCE_S)
        self._process.stdout.close()
        self._process = None
        return code

    def check_lock_is_free(self) -> None:
        """Nothing that a killed server left behind holds its lock."""
        with (self.path / "run" / "lock").open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def strays(self) -> list[str]:
        """Processes of this home that aren't of the server that runs now: seen before, or found by where they run."""
        present = set() if self._process is None else {self._process.pid}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_ours = str(self.path) in " ".join((process.cwd(), *process.cmdline()))
                if process.status() == psutil.STATUS_ZOMBIE or present & {process.pid, process.ppid()}:
                    continue
                if is_ours or Trace(process.pid, process.create_time()) in self.seen:
                    ports = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                    found.append(f"{process.pid} {process.cmdline()} listening on {ports}")
        return found

    def report(self) -> str:
        """Figures for a person."""
        return f"start to ready: median {median(self.restarts_s):.2f} s of {len(self.restarts_s)}"

    def end_all(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process is not None:
            self._process.kill()
            self.reap()
        for trace in self.seen:
            trace.kill()
        for stray in self.strays():
            os.kill(int(stray.split()[0]), signal.SIGKILL)

    @property
    def _said(self) -> Path:
        return self.path.with_suffix(".said")


@asynccontextmanager
async def open_home(path: Path, dice: Dice, **settings: str) -> AsyncIterator[Home]:
    """A home at ``path`` whose servers all take the same port, and its end."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        changed = {name.replace("__", "."): value for name, value in settings.items()}
        home = Home(path, session, _free_port(dice), changed)
        try:
            yield home
        finally:
            home.end_all()


def _free_port(dice: Dice) -> int:
    """A port below those that the system gives to whoever asks for any."""
    for port in _ports(dice):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _ports(dice: Dice) -> Iterable[int]:
    return (20_000 + int(dice.uniform() * 12_000) for _ in range(1000))
