"""The command line as a person uses it: real processes, a real server, a fake engine."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleetmind.cli.banner import curl

QUICK = {"models.preload": "", "server.port": "0", "node.stop_grace_s": "1", "fleet.reconcile_interval_s": "0.05"}
SETTINGS = [part for name, value in QUICK.items() for part in ("--set", f"{name}={value}")]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("FLEETMIND_")}
PROGRAM = [sys.executable, "-m", "fleetmind.cli.main"]


def command(home: Path, *arguments: str) -> list[str]:
    return [*PROGRAM, *arguments, "--home", str(home)]


def fleetmind(home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(home, *arguments),
        input=stdin,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=100,
        check=False,
    )


def result(home: Path, *arguments: str) -> Any:
    """What a command prints with --json; it must succeed."""
    done = fleetmind(home, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(home: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and error of a command that must fail."""
    done = fleetmind(home, *arguments, "--json")
    assert done.stdout == ""
    return done.returncode, json.loads(done.stderr.splitlines()[-1])["error"]


def post(url: str, key: str, body: dict[str, object]) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A detached server with one fake model, and what its first start printed."""
    home = tmp_path_factory.mktemp("served") / "home"
    started = result(home, "up", "--detach", *SETTINGS)
    try:
        result(home, "models", "add", "pretend", "--fake", "--option", "reply_tokens=12")
        yield home, started
    finally:
        assert fleetmind(home, "down").returncode == 0
        assert not psutil.pid_exists(started["pid"])


Served = tuple[Path, dict[str, Any]]


def test_the_curl_line_that_a_start_prints_works_as_pasted(served: Served) -> None:
    if shutil.which("curl") is None:
        assert os.environ.get("CI") != "true", "install curl"
        pytest.skip("no curl")
    home, started = served
    for key in (started["key"], None):  # as the first start prints it, and as every later one does
        text = "\n".join(curl({**started, "key": key, "models": ["pretend: ready"]}))
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, timeout=60)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert started["token_file"] == str(home / "run" / "token")


def test_what_a_start_leaves_can_be_read_by_its_owner_only(served: Served) -> None:
    home, _ = served
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.rglob("*")) if not path.is_symlink()}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_ask_and_chat_print_the_answer(served: Served) -> None:
    home, _ = served
    done = fleetmind(home, "ask", "Hello?", "--model", "pretend")
    assert (done.returncode, len(done.stdout.split()) > 3) == (0, True), done.stderr
    done = fleetmind(home, "chat", stdin="Hello?\nAnd again?\n")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


def test_status_and_doctor_tell_that_the_model_is_simulated_and_all_is_well(served: Served) -> None:
    home, started = served
    assert "pretend (simulated)" in fleetmind(home, "status").stdout
    status = result(home, "status")
    assert (status["ready"], status["pid"], status["is_simulated"]) == (True, started["pid"], True)
    assert {check["status"] for check in result(home, "doctor")["checks"]} <= {"ok", "warn"}


def test_a_key_works_from_its_making_to_its_revocation(served: Served) -> None:
    home, started = served
    body: dict[str, object] = {"model": "pretend", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    key = fleetmind(home, "keys", "create", "notebook").stdout.strip()
    assert post(f"{started['url']}/v1/chat/completions", key, body)[0] == 200
    assert key not in fleetmind(home, "keys", "ls").stdout
    assert fleetmind(home, "keys", "revoke", "notebook").returncode == 0
    assert post(f"{started['url']}/v1/chat/completions", key, body)[0] == 401


def test_an_unknown_model_is_answered_with_the_nearest_name(served: Served) -> None:
    home, _ = served
    code, error = refused(home, "ask", "x", "--model", "pretned")
    assert (code, error["code"], error["near"]) == (3, "model_not_found", ["pretend"])
    code, error = refused(home, "models", "rm", "pretned")
    assert (code, error["near"]) == (3, ["pretend"])


def test_a_model_can_be_added_once_and_removed(served: Served) -> None:
    home, _ = served
    assert result(home, "models", "add", "second", "--fake")["state"] == "ready"
    assert refused(home, "models", "add", "second", "--fake")[0] == 5
    assert result(home, "models", "rm", "second") == {"removed": "second"}
    assert [model["name"] for model in result(home, "models", "ls")["models"]] == ["pretend"]


def test_a_damaged_model_file_is_refused_by_the_name_of_the_fault(served: Served, tmp_path: Path) -> None:
    home, _ = served
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and then no more")
    for arguments in (["models", "add"], ["fit"]):
        code, error = refused(home, *arguments, str(tmp_path / "broken.gguf"))
        assert (code, error["code"]) == (1, "invalid_model_file")
    assert refused(tmp_path, "fit", str(tmp_path / "broken.gguf"))[1]["code"] == "invalid_model_file"


def test_logs_show_the_server_and_the_engine(served: Served) -> None:
    home, _ = served
    (replica,) = result(home, "status")["replicas"]
    assert fleetmind(home, "logs", "--replica", replica["id"][:10]).stdout
    assert result(home, "logs", "-n", "1")["lines"]


def test_settings_are_shown_as_the_running_server_has_them(served: Served) -> None:
    home, _ = served
    (running,) = result(home, "config", "show", "node.stop_grace_s")["values"]
    assert (running["value"], running["source"]) == (1.0, "flag")
    (local,) = result(home, "config", "show", "node.stop_grace_s", "--local")["values"]
    assert local["source"] == "default"


def test_a_second_server_on_the_same_home_is_refused(served: Served) -> None:
    home, started = served
    for arguments in (["up"], ["up", "--detach"]):
        code, error = refused(home, *arguments)
        assert (code, error["code"]) == (5, "conflict")
        assert str(started["pid"]) in error["message"]


def test_a_port_in_use_is_refused_in_the_foreground_and_detached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for arguments in (["up"], ["up", "--detach"]):
            code, error = refused(tmp_path, *arguments, "--port", port, "--set", "models.preload=")
            assert (code, port in error["message"]) == (5, True)
            assert "--port" in error["hint"]


def test_a_wrong_setting_ends_a_start_with_its_own_code(tmp_path: Path) -> None:
    for arguments in (["up"], ["up", "--detach"]):
        code, error = refused(tmp_path, *arguments, "--set", "server.prot=1")
        assert (code, error["code"]) == (78, "invalid_configuration")
        assert "server.port" in error["hint"]


def test_ctrl_c_ends_a_server_in_order(tmp_path: Path) -> None:
    server = subprocess.Popen(
        command(tmp_path, "up", *SETTINGS), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert server.stdout is not None
    assert any("Ctrl-C" in line for line in server.stdout)
    server.send_signal(signal.SIGINT)
    _, narrated = server.communicate(timeout=60)
    assert (server.returncode, "Stopped." in narrated) == (0, True), narrated
    assert not (tmp_path / "run" / "server.json").exists()
    assert fleetmind(tmp_path, "status").returncode == 6


def test_ctrl_c_stops_an_answer_and_gives_its_slot_back(served: Served) -> None:
    home, _ = served
    result(home, "models", "add", "slow", "--fake", "--option", "tokens_per_s=5", "--option", "reply_tokens=1000")
    asking = subprocess.Popen(
        command(home, "ask", "x", "--model", "slow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1)
    assert result(home, "status")["calls"]["outstanding"] == 1
    asking.send_signal(signal.SIGINT)
    asking.communicate(timeout=30)
    assert asking.returncode == 130
    assert any(result(home, "status")["calls"]["outstanding"] == 0 for _ in range(20)), "it would take 200 s by itself"
    result(home, "models", "rm", "slow")


def test_a_killed_server_is_not_taken_for_a_running_one_and_the_next_start_serves(tmp_path: Path) -> None:
    first = result(tmp_path, "up", "--detach", *SETTINGS)
    result(tmp_path, "models", "add", "pretend", "--fake")
    os.kill(first["pid"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first["pid"])] if psutil.pid_exists(first["pid"]) else [], timeout=10)
    assert (tmp_path / "run" / "server.json").exists()
    assert fleetmind(tmp_path, "status").returncode == 6
    second = result(tmp_path, "up", "--detach", *SETTINGS)
    try:
        assert second["key"] is None
        assert fleetmind(tmp_path, "ask", "x", "--model", "pretend").returncode == 0
    finally:
        fleetmind(tmp_path, "down")


def test_the_doctor_finds_a_changed_journal_while_no_server_runs(tmp_path: Path) -> None:
    result(tmp_path, "up", "--detach", *SETTINGS)
    assert result(tmp_path, "down")["stopped"] is True
    checks = {check["name"]: check for check in result(tmp_path, "doctor")["checks"]}
    assert checks["journal"]["status"] == "ok"
    with sqlite3.connect(tmp_path / "fleetmind.db") as database:
        for (trigger,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {trigger}")  # they only stop who means well
        database.execute("UPDATE journal SET subject = 'somebody else' WHERE position = 1")
    database.close()
    done = fleetmind(tmp_path, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["journal"]["status"]) == (1, "fail")


def test_the_doctor_leaves_a_database_alone_that_a_server_holds(tmp_path: Path) -> None:
    started = result(tmp_path, "up", "--detach", *SETTINGS)
    (tmp_path / "run" / "server.json").unlink()  # as while it is starting
    try:
        checks = {check["name"]: check for check in result(tmp_path, "doctor")["checks"]}
        assert checks["database"]["status"] == "warn"
        assert "journal" not in checks
    finally:
        os.kill(started["pid"], signal.SIGTERM)
        psutil.wait_procs([psutil.Process(started["pid"])] if psutil.pid_exists(started["pid"]) else [], timeout=30)
