"""Processes under test are started, measured and always ended."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from bench.footprint import disk_bytes
from bench.processes import NotMeasured, Running

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""


def test_leaving_ends_the_process_and_its_children(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    with Running("family", (sys.executable, "-c", FAMILY, said), log=tmp_path / "log", cwd=tmp_path) as running:
        running.wait_until(lambda: said.exists() and said.read_text() != "", within_s=20)
        child = psutil.Process(int(said.read_text()))
        assert {each.pid for each in running.family()} == {running.pid, child.pid}
        assert running.memory().rss_bytes > running.memory().pss_bytes > 0
    assert not psutil.pid_exists(running.pid)
    with suppress(psutil.TimeoutExpired):  # it was killed, but is not our child: its end is seen only by looking
        child.wait(timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_ends_at_once_says_why(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "print('no such port'); raise SystemExit(3)")
    with (
        Running("short", argv, log=tmp_path / "log", cwd=tmp_path) as running,
        pytest.raises(NotMeasured, match=r"short ended with 3:\nno such port"),
    ):
        running.wait_until(lambda: False, within_s=20)


def test_what_a_process_reads_first_is_given_to_it(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "import sys; print(sys.stdin.read().upper())")
    with Running("reader", argv, log=tmp_path / "log", cwd=tmp_path, stdin=b"the key") as running:
        assert running.wait(20) == 0
        assert running.log_tail() == "THE KEY"


def test_disk_counts_hard_links_once_and_leaves_out_the_model(tmp_path: Path) -> None:
    for name in ("code", "model_files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(os.urandom(40_000))
    os.link(tmp_path / "code" / "data", tmp_path / "code" / "again")
    alone = disk_bytes(tmp_path, without="model_files")
    assert 40_000 <= alone < 60_000
    assert disk_bytes(tmp_path) >= alone + 40_000
