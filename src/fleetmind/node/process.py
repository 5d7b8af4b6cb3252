"""One engine process: started with bounds, watched, and ended with everything it started.

Each has a session and process group of its own, its output goes to a bounded log, secrets reach it only by stdin or
by files of mode 0600, and no shell is ever involved. Ending is SIGTERM to the group, a grace, SIGKILL to the group,
and waiting until the kernel has reaped it. Invariant: when ``wait`` has returned, no process of the group is left.

Memory is bounded by watching, not by RLIMIT_AS: an engine maps its weights, and address space would count them
twice. Mapped files are not counted either, the kernel can drop them.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from fleetmind.core.errors import EngineStartFailed
from fleetmind.node.engine import Command
from fleetmind.node.ledger import process_identity
from fleetmind.node.lifeline import LIFELINE_VARIABLE
from fleetmind.node.logs import ReplicaLog

LAUNCHER = str(Path(__file__).with_name("launch.py"))
KILL_S_MAX = 10.0
"""How long a killed process may take to vanish; longer means it hangs in the kernel."""
INPUT_BYTES_MAX = 60_000
"""What a pipe takes without waiting for its reader."""
LOG_END_S_MAX = 1.0
"""How long the last words of an ended process are waited for."""

INHERITED = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "SSL_CERT_FILE")
INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "GGML_")
"""What an engine sees of our environment. Nothing else: keys of remote services live there, and ``LLAMA_ARG_…`` would
change an engine behind our back."""


@dataclass(frozen=True, slots=True)
class ProcessBounds:
    """What a process may take. ``oom_score`` is 0 to 1000; the kernel ends the highest first."""

    files_max: int = 65536
    oom_score: int = 500
    nice: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: its exit code, or minus the number of the signal; None when it cannot be ended."""

    code: int | None

    def words(self) -> str:
        """For a person: ``"exited with code 1"``, ``"was killed by signal 9 (SIGKILL)"``."""
        if self.code is None:
            return f"did not end within {KILL_S_MAX:.0f} s of SIGKILL"
        if self.code >= 0:
            return f"exited with code {self.code}"
        try:
            name = f" ({signal.Signals(-self.code).name})"
        except ValueError:
            name = ""
        return f"was killed by signal {-self.code}{name}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children have used: seconds of processor, and bytes of memory that are theirs alone."""

    cpu_s: float
    memory_bytes: int


class EngineProcess:
    """A started process. Make one with :meth:`start`."""

    def __init__(self, process: asyncio.subprocess.Process, log: ReplicaLog, pipes: "_Pipes", identity: str) -> None:
        self.pid = process.pid
        self.identity = identity
        self.log = log
        self._process = process
        self._pipes = pipes
        self._ended: asyncio.Task[Exit] = asyncio.create_task(self._run_out(), name=f"process {self.pid}")

    @classmethod
    async def start(
        cls,
        command: Command,
        *,
        directory: Path,
        log: ReplicaLog,
        bounds: ProcessBounds,
        environ: Mapping[str, str],
    ) -> "EngineProcess":
        """Start ``command`` in ``directory``; its stdin is not written yet (:meth:`deliver`), so that it can be
        written down first. Raises EngineStartFailed when the system refuses a process."""
        await asyncio.to_thread(_write_files, directory, command.files)
        facts = {
            "parent": os.getpid(),
            "files_max": bounds.files_max,
            "oom_score": bounds.oom_score,
            "nice": bounds.nice,
        }
        with _Pipes() as pipes:
            lifeline = {LIFELINE_VARIABLE: str(pipes.lifeline.theirs)}
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", LAUNCHER, json.dumps(facts), "--", *command.argv),
                    stdin=pipes.input.theirs,
                    stdout=pipes.output.theirs,
                    stderr=pipes.output.theirs,
                    cwd=directory,
                    env=_environment(environ) | dict(command.env) | lifeline,
                    pass_fds=(pipes.lifeline.theirs,),
                    start_new_session=True,
                )
            except OSError as fault:
                pipes.close_ours()
                raise EngineStartFailed(f"cannot start a process: {fault.strerror}") from fault
        return cls(process, log, pipes, process_identity(process.pid) or "gone")

    def deliver(self, stdin: bytes) -> None:
        """Write the process's input and close it. A process that is already gone is no error here; waiting tells."""
        assert len(stdin) <= INPUT_BYTES_MAX
        with suppress(BrokenPipeError):
            os.write(self._pipes.input.ours, stdin)
        self._pipes.input.close_ours()

    async def wait(self) -> Exit:
        """Return once the process has ended and its group with it."""
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float) -> Exit:
        """End the group: SIGTERM, ``grace_s``, SIGKILL. Safe to call again, and after the end."""
        if not self._ended.done():
            self._signal(signal.SIGTERM)
            await asyncio.wait({self._ended}, timeout=grace_s)
        if not self._ended.done():
            self._signal(signal.SIGKILL)
            await asyncio.wait({self._ended}, timeout=KILL_S_MAX)
        return self._ended.result() if self._ended.done() else Exit(None)

    async def usage(self) -> Usage:
        """What it uses now; zeros when it is gone."""
        return await asyncio.to_thread(_usage, self.pid)

    async def owns_port(self, port: int) -> bool:
        """Whether the process or a child of it listens on loopback ``port``."""
        return await asyncio.to_thread(_owns_port, self.pid, port)

    def _signal(self, number: signal.Signals) -> None:
        # PermissionError: macOS says so of a group of zombies.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _run_out(self) -> Exit:
        output = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(self._pipes.output.take_ours(), "rb", 0)
        )
        pump = asyncio.create_task(self.log.pump(output), name=f"log of {self.pid}")
        try:
            code = await self._process.wait()
            self._signal(signal.SIGKILL)  # what it started and left behind
            await asyncio.wait({pump}, timeout=LOG_END_S_MAX)
        finally:
            pump.cancel()
            await asyncio.wait({pump})
            transport.close()
            self._pipes.close_ours()
        return Exit(code)


class _Pipe:
    """A pipe between us and a process; each end is closed once."""

    def __init__(self, *, is_ours_writing: bool) -> None:
        reading, writing = os.pipe()
        self.theirs, self._ours = (reading, writing) if is_ours_writing else (writing, reading)

    @property
    def ours(self) -> int:
        return self._ours

    def take_ours(self) -> int:
        """Our end, whose closing is the caller's business now."""
        taken, self._ours = self._ours, -1
        return taken

    def close_ours(self) -> None:
        if self._ours >= 0:
            os.close(self.take_ours())


class _Pipes:
    """The pipes of a process. Not asyncio's: with those the end of a process is not seen while a child of it still
    holds its output open. Leaving the context closes the other side's ends here."""

    def __init__(self) -> None:
        self.input = _Pipe(is_ours_writing=True)
        self.output = _Pipe(is_ours_writing=False)
        self.lifeline = _Pipe(is_ours_writing=True)
        self._all = (self.input, self.output, self.lifeline)

    def __enter__(self) -> "_Pipes":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._all:
            os.close(pipe.theirs)

    def close_ours(self) -> None:
        for pipe in self._all:
            pipe.close_ours()


def free_port() -> int:
    """A loopback port that was free just now. Whether our process really got it is checked before it sees its key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name in INHERITED or name.startswith(INHERITED_PREFIXES)}


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in files.items():
        assert Path(name).name == name
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def _family(pid: int) -> list[psutil.Process]:
    try:
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return []


def _usage(pid: int) -> Usage:
    cpu_s, memory_bytes = 0.0, 0
    for process in _family(pid):
        with suppress(psutil.Error):
            times, memory = process.cpu_times(), process.memory_info()
            cpu_s += times.user + times.system
            memory_bytes += memory.rss - getattr(memory, "shared", 0)
    return Usage(cpu_s, memory_bytes)


def _owns_port(pid: int, port: int) -> bool:
    for process in _family(pid):
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                    return True
    return False
