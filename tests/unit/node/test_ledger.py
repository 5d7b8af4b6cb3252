"""Orphans are ended by pid and start time; everybody else is left alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetmind.node.ledger import Ledger, LedgerEntry, process_identity


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, as an engine is; it ends when its stdin does."""
    process = sleeper("import sys; sys.stdin.read()")
    yield process
    process.kill()
    process.communicate()


def sleeper(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)


def entry(pid: int, identity: str | None = None, replica_id: str = "r-1") -> LedgerEntry:
    return LedgerEntry(replica_id, pid, identity or process_identity(pid) or "", "python", "a-model")


def test_an_orphan_is_ended_and_named(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    Ledger(tmp_path).write(entry(stranger.pid))
    (orphan,) = Ledger(tmp_path).end_orphans(5.0)
    assert (orphan.replica_id, orphan.model, orphan.pid, orphan.was_killed) == ("r-1", "a-model", stranger.pid, False)
    assert process_identity(stranger.pid) is None
    assert Ledger(tmp_path).entries() == ()


def test_a_pid_that_now_belongs_to_somebody_else_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    identity = process_identity(stranger.pid)
    assert identity is not None
    ledger = Ledger(tmp_path)
    ledger.write(entry(stranger.pid, identity + "0"))
    ledger.write(entry(stranger.pid, "linux:another-boot:" + identity.rpartition(":")[2], "r-2"))
    assert ledger.end_orphans(1.0) == ()
    assert stranger.poll() is None
    assert ledger.entries() == ()


def test_an_orphan_that_ignores_the_signal_is_killed_with_its_children(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, subprocess, sys\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "print(child.pid, flush=True)\n"
            "child.wait()",
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    Ledger(tmp_path).write(entry(process.pid))
    (orphan,) = Ledger(tmp_path).end_orphans(0.1)
    assert orphan.was_killed
    process.communicate(timeout=5)
    assert process_identity(process.pid) is None
    assert process_identity(child) is None


@pytest.mark.timeout(30)
def test_an_orphan_that_nobody_reaps_is_not_waited_for(tmp_path: Path) -> None:
    negligent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
            "print(child.pid, flush=True)\n"
            "sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert negligent.stdout is not None
        Ledger(tmp_path).write(entry(int(negligent.stdout.readline())))
        (orphan,) = Ledger(tmp_path).end_orphans(60.0)
        assert not orphan.was_killed
    finally:
        negligent.communicate(timeout=10)


def test_a_process_that_is_gone_is_no_orphan(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    Ledger(tmp_path).write(entry(stranger.pid))
    stranger.kill()
    stranger.wait()
    assert Ledger(tmp_path).end_orphans(1.0) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({"replica_id": "r-1", "pid": -1, "identity": "x", "argv0": "x", "model": ""}),
        json.dumps({"replica_id": "r-1", "pid": 1, "identity": "x", "argv0": "x", "model": ""}),
        json.dumps({"replica_id": "r-1", "pid": "7", "identity": "x", "argv0": "x", "model": ""}),
        json.dumps({"replica_id": "r-1", "pid": 99, "identity": None, "argv0": "x", "model": ""}),
        json.dumps({"replica_id": "another", "pid": 99, "identity": "x", "argv0": "x", "model": ""}),
        json.dumps({"replica_id": "r-1", "pid": 99, "identity": "x", "argv0": "x", "model": "", "more": 1}),
    ],
)
def test_a_corrupt_file_is_set_aside_and_believed_in_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "r-1.json").write_text(text)
    assert Ledger(tmp_path).end_orphans(0.1) == ()
    assert [path.name for path in tmp_path.iterdir()] == ["r-1.damaged"]


def test_entries_are_private_and_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "deeper")
    ledger.write(entry(os.getpid()))
    (path,) = (tmp_path / "deeper").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert ledger.entries() == (entry(os.getpid()),)
    ledger.remove("r-1")
    ledger.remove("r-1")
    assert ledger.entries() == ()


def test_the_remains_of_a_process_have_no_identity(stranger: subprocess.Popen[bytes]) -> None:
    assert process_identity(stranger.pid)
    stranger.kill()
    os.waitid(os.P_PID, stranger.pid, os.WEXITED | os.WNOWAIT)  # dead, not yet reaped
    assert process_identity(stranger.pid) is None
