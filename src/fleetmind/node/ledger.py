"""Which processes are ours, written down so that the next start can end what a killed server left behind.

One file per replica under ``run/replicas``, written atomically before the process is given its work. A process is
known by its pid *and* the moment the kernel started it, never by name: a pid that now belongs to somebody else is
left alone. A file that cannot be understood is set aside, not believed. Invariant: nothing is killed unless both match.
"""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fleetmind.core.clock import monotonic_ns, pause

ENTRY_BYTES_MAX = 65536
KILL_S_MAX = 5.0
LOOK_AGAIN_S = 0.01


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A process of ours. ``identity`` is what :func:`process_identity` said when it started."""

    replica_id: str
    pid: int
    identity: str
    argv0: str
    model: str = ""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A process that was ours, outlived its server, and has been ended. ``was_killed`` when it ignored SIGTERM."""

    replica_id: str
    model: str
    pid: int
    argv0: str
    was_killed: bool


def process_identity(pid: int) -> str | None:
    """What tells this process from any other that ever had its pid; None when there is none (or only its remains).

    On Linux the boot and the clock tick of its start, which no change of the wall clock moves.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return _portable_identity(pid)
    return None if state in "ZX" else f"linux:{boot}:{fields[18]}"  # field 22 of proc(5), after pid, name and state


def _portable_identity(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"start:{process.create_time():.3f}"
    except psutil.Error:
        return None


class Ledger:
    """The files under ``directory``. All methods block shortly."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, entry: LedgerEntry) -> None:
        """Put ``entry`` down, whole or not at all."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self._directory / f"{entry.replica_id}.json"
        draft = target.with_suffix(".draft")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(entry), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)

    def remove(self, replica_id: str) -> None:
        """Strike out an entry; one that is not there is no error."""
        (self._directory / f"{replica_id}.json").unlink(missing_ok=True)

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries that can be understood; the others are renamed to ``….damaged``."""
        found = []
        for path in sorted(self._directory.glob("*.json")) if self._directory.is_dir() else []:
            entry = _read(path)
            if entry is None:
                path.replace(path.with_suffix(".damaged"))
            else:
                found.append(entry)
        return tuple(found)

    def end_orphans(
        self, grace_s: float, *, identity: Callable[[int], str | None] = process_identity
    ) -> tuple[Orphan, ...]:
        """End every process of an earlier server that still runs, and empty the ledger. Blocks up to ``grace_s``."""
        entries = self.entries()
        alive = [entry for entry in entries if identity(entry.pid) == entry.identity]
        for entry in alive:
            _signal(entry.pid, signal.SIGTERM)
        _wait(alive, grace_s, identity)
        stubborn = {entry.pid for entry in alive if identity(entry.pid) == entry.identity}
        for entry in alive:  # also where the leader went quietly: its children may not have
            if entry.pid in stubborn or identity(entry.pid) is None:
                _signal(entry.pid, signal.SIGKILL)
        _wait(alive, KILL_S_MAX, identity)
        for entry in entries:
            self.remove(entry.replica_id)
        return tuple(
            Orphan(entry.replica_id, entry.model, entry.pid, entry.argv0, entry.pid in stubborn) for entry in alive
        )


def _read(path: Path) -> LedgerEntry | None:
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(ENTRY_BYTES_MAX))
        entry = LedgerEntry(**fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    types_hold = type(entry.pid) is int and all(
        isinstance(text, str) for text in (entry.replica_id, entry.identity, entry.argv0, entry.model)
    )
    # A pid below 2 would mean every process, or init.
    return entry if types_hold and entry.pid > 1 and path.stem == entry.replica_id else None


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)  # every engine leads a group of its own, whose id is its pid


def _wait(entries: list[LedgerEntry], seconds: float, identity: Callable[[int], str | None]) -> None:
    """Until they have ended. Not psutil's wait: that goes on until somebody has reaped them, which in a container may
    be long after, or never."""
    deadline_ns = monotonic_ns() + int(seconds * 1e9)
    while any(identity(entry.pid) == entry.identity for entry in entries) and monotonic_ns() < deadline_ns:
        pause(LOOK_AGAIN_S)
