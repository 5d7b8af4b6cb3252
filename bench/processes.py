"""Processes under test: started in a group of their own, measured by pid, always ended by pid.

A server must answer before it counts as started, within a bound. What it wrote is kept until the end, so that a
server that would not start can say why.
"""

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import psutil

STOP_GRACE_S = 10.0


class NotMeasured(Exception):
    """Why there is no figure: a process under test ended, did not answer in time, or answered wrongly."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process and its descendants, in bytes. PSS shares pages among those that map them."""

    rss_bytes: int
    pss_bytes: int


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_on_terminate() -> None:
    """Turn SIGTERM into an orderly exit, so that the processes under test are ended too."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


class Running:
    """One process under test. Use it as a context manager: leaving ends the whole group."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> None:
        self.name = name
        self._log = log
        self.started_at_s = time.monotonic()
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [str(part) for part in argv],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(stdin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until(self, answered: Callable[[], bool], *, within_s: float) -> float:
        """Seconds from the start until ``answered`` was true. Raises NotMeasured when it ended or took too long."""
        deadline = self.started_at_s + within_s
        while not answered():
            if self._process.poll() is not None:
                raise NotMeasured(f"{self.name} ended with {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise NotMeasured(f"{self.name} did not answer within {within_s:g} s:\n{self.log_tail()}")
            time.sleep(0.02)
        return time.monotonic() - self.started_at_s

    def wait(self, within_s: float) -> int:
        """Its exit status, once it ended by itself."""
        return self._process.wait(within_s)

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def family(self) -> list[psutil.Process]:
        """The process and its descendants."""
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> Memory:
        """What it and its descendants hold now."""
        return memory_of(self.family())

    def cpu_s(self) -> float:
        """Processor seconds (user and system) that it and its living descendants have used so far."""
        total = 0.0
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        """Ask the group to end, and after a grace make it. Descendants that left the group are ended by pid."""
        family = self.family()
        self._signal_group(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_GRACE_S)
        self._signal_group(signal.SIGKILL)
        self._process.wait(STOP_GRACE_S)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _signal_group(self, number: signal.Signals) -> None:
        # The leader's pid is the group's id; a group whose members are all gone has none.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def memory_of(processes: Sequence[psutil.Process]) -> Memory:
    rss = pss = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            info = process.memory_full_info()
            rss += info.rss
            pss += info.pss
    return Memory(rss, pss)


def settled_memory(running: Running, *, settle_s: float = 2.0) -> Memory:
    """Memory once the process has had a moment to finish what it was doing."""
    time.sleep(settle_s)
    return running.memory()


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    body: bytes


def ask(
    port: int,
    method: str,
    path: str,
    *,
    body: bytes | None = None,
    key: str = "",
    timeout_s: float = 30.0,
) -> Answer:
    """One request on a connection of its own. Raises OSError or HTTPException when there is no whole answer."""
    headers = {"content-type": "application/json"} if body is not None else {}
    if key:
        headers["authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    finally:
        connection.close()


def answers(port: int, path: str, *, key: str = "") -> Callable[[], bool]:
    """Whether GET ``path`` is answered with 200 now; made for ``wait_until``."""

    def asked() -> bool:
        try:
            return ask(port, "GET", path, key=key, timeout_s=5.0).status == 200
        except (OSError, http.client.HTTPException):
            return False

    return asked
