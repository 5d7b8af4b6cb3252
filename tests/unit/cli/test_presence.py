"""A server counts as running only while its process lives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fleetmind.cli.exits import Unreachable
from fleetmind.cli.presence import find, lives, require, resolve_home


def leave(home: Path, **changed: object) -> None:
    (home / "run").mkdir(parents=True, exist_ok=True)
    document = {"url": "http://127.0.0.1:9", "pid": os.getpid(), "started_at_s": psutil.Process().create_time()}
    (home / "run" / "server.json").write_text(json.dumps({**document, "token": "secret-token", **changed}))


def test_a_living_server_is_found_and_its_token_never_shows(tmp_path: Path) -> None:
    leave(tmp_path)
    found = find(tmp_path)
    assert found is not None
    assert (found.url, found.token) == ("http://127.0.0.1:9", "secret-token")
    assert "secret-token" not in repr(found)


def test_a_file_left_by_a_process_that_ended_is_no_server(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    started_at_s = psutil.Process(ended.pid).create_time()
    ended.wait()
    leave(tmp_path, pid=ended.pid, started_at_s=started_at_s)
    assert find(tmp_path) is None


def test_a_pid_that_now_belongs_to_another_process_is_no_server(tmp_path: Path) -> None:
    leave(tmp_path, started_at_s=psutil.Process().create_time() - 3600)
    assert find(tmp_path) is None


def test_a_process_that_ended_and_was_not_waited_for_does_not_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    started_at_s = psutil.Process(child.pid).create_time()
    assert child.stdout is not None
    child.stdout.read()  # closed by its end
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not lives(child.pid, started_at_s)
    child.wait()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"url": 1}', '{"url": "x", "pid": "many"}', "\xff", "9" * 70000]
)
def test_a_file_that_is_none_of_ours_is_no_server(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "server.json").write_text(text, encoding="latin-1")
    assert find(tmp_path) is None


def test_requiring_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=str(tmp_path)) as raised:
        require(tmp_path)
    assert "fleetmind up" in raised.value.hint


def test_the_home_is_the_flag_then_the_variable_then_the_default(tmp_path: Path) -> None:
    environ = {"HOME": "/home/me", "FLEETMIND_HOME": "/srv/fleet"}
    assert resolve_home(tmp_path, environ) == tmp_path
    assert resolve_home(None, environ) == Path("/srv/fleet")
    assert resolve_home(None, {"HOME": "/home/me"}) == Path("/home/me/.local/share/fleetmind")
