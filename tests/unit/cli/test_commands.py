"""Commands from the command line to the request, and from the answer to what is printed."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.answering import Answering, Reply, Script, answering, model, part, problem, stream_of

from fleetmind.cli.main import run

KEYS = [
    {"id": "AAAAAAAA", "name": "notebook", "scopes": ["infer"], "models": [], "created_at_s": 1.0,
     "expires_at_s": None, "revoked_at_s": None, "last_used_at_s": None},
    {"id": "BBBBBBBB", "name": "twice", "scopes": ["infer"], "models": ["m"], "created_at_s": 1.0,
     "expires_at_s": 2.0, "revoked_at_s": None, "last_used_at_s": 3.0},
    {"id": "CCCCCCCC", "name": "twice", "scopes": ["infer"], "models": [], "created_at_s": 1.0,
     "expires_at_s": None, "revoked_at_s": None, "last_used_at_s": None},
    {"id": "DDDDDDDD", "name": "old", "scopes": ["infer"], "models": [], "created_at_s": 1.0,
     "expires_at_s": None, "revoked_at_s": 9.0, "last_used_at_s": None},
]  # fmt: skip
REPLICAS = [{"id": "m-1111", "model": "m"}, {"id": "m-1222", "model": "m"}]


def server_answers(method: str, path: str, body: Any) -> Reply:
    """A well-behaved server with two models, one of them loading."""
    match method, path.partition("?")[0]:
        case "GET", "/api/models":
            return 200, {"models": [model("slow", "loading"), model("embedder", abilities=["embedding"]), model("m")]}
        case "POST", "/api/models":
            return 201, model(body.get("name") or "m", "loading")
        case "POST", "/v1/chat/completions" if body.get("stream"):
            return 200, stream_of(part("Hel"), part("lo", "length"))
        case "POST", "/v1/chat/completions":
            return 200, {"choices": [{"message": {"content": "Hello"}}]}
        case "GET", "/api/keys":
            return 200, {"keys": KEYS}
        case "POST", "/api/keys":
            return 201, {**KEYS[0], "key": "fm_AAAAAAAA_text_check", "scopes": body["scopes"]}
        case "GET", "/api/replicas":
            return 200, {"replicas": REPLICAS}
        case "GET", "/api/replicas/m-1111/log" | "/api/logs":
            return 200, {"lines": ["one", "two"]}
        case "DELETE", _:
            return 204, None
    return 404, problem("not_found", f"nothing at {path}")


@contextmanager
def home_with(tmp_path: Path, script: Script = server_answers) -> Iterator[Answering]:
    with answering(script) as server:
        server.announce(tmp_path)
        yield server


def bodies(server: Answering, path: str) -> list[Any]:
    return [body for method, asked, body in server.asked if method == "POST" and asked == path]


def test_ask_prints_the_answer_of_the_first_chat_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with home_with(tmp_path) as server:
        assert run(["ask", "Hi", "--system", "Be brief.", "--max-tokens", "7", "--home", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert "limit" in err
    assert bodies(server, "/v1/chat/completions") == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "max_tokens": 7,
            "stream": True,
        }
    ]


def test_ask_reads_standard_input_for_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a long\ntext\n"))
    with home_with(tmp_path) as server:
        assert run(["ask", "-", "--no-stream", "--model", "m", "--home", str(tmp_path)]) == 0
    assert bodies(server, "/v1/chat/completions")[0]["messages"] == [{"role": "user", "content": "a long\ntext\n"}]
    assert capsys.readouterr().out == "Hello\n"


def test_ask_with_json_prints_the_whole_reply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with home_with(tmp_path):
        assert run(["ask", "Hi", "--json", "--home", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["choices"][0]["message"]["content"] == "Hello"


def test_asking_nothing_is_a_usage_error(tmp_path: Path) -> None:
    with home_with(tmp_path):
        assert run(["ask", "  ", "--home", str(tmp_path)]) == 2


def test_chat_remembers_what_was_said_until_it_is_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["one", "two", "/clear", "/model slow", "/model gone", "/what", "three", "/exit", "four"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    with home_with(tmp_path) as server:
        assert run(["chat", "m", "--system", "S", "--home", str(tmp_path)]) == 0
    said = bodies(server, "/v1/chat/completions")
    assert [[message["content"] for message in body["messages"]] for body in said] == [
        ["S", "one"],
        ["S", "one", "Hello", "two"],
        ["S", "three"],
    ]
    assert [body["model"] for body in said] == ["m", "m", "slow"]
    out, err = capsys.readouterr()
    assert out == "Hello\n" * 3
    assert "gone is not in the catalogue" in err
    assert "/what is not known here" in err


def test_chat_forgets_a_question_whose_answer_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fail\nwork\n"))

    def script(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/chat/completions" and body["messages"][-1]["content"] == "fail":
            return 400, problem("context_length_exceeded", "too long")
        return server_answers(method, path, body)

    with home_with(tmp_path, script) as server:
        assert run(["chat", "--home", str(tmp_path)]) == 0
    assert [message["content"] for message in bodies(server, "/v1/chat/completions")[-1]["messages"]] == ["work"]
    assert "/clear" in capsys.readouterr().err


def test_without_a_chat_model_it_says_how_to_add_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with home_with(tmp_path, lambda *_: (200, {"models": []})):
        assert run(["ask", "Hi", "--home", str(tmp_path)]) == 3
    assert "fleetmind models add" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["big", "--remote", "https://llm.example.org/v1", "--remote-model", "llama", "--key-env", "K"],
            {"source": "remote", "name": "big", "url": "https://llm.example.org/v1", "remote_model": "llama",
             "key_env": "K", "replicas": 1},
        ),
        (
            ["pretend", "--fake", "--option", "tokens_per_s=50", "--option", "error_after=2.5", "--option", "hang=true",
             "--slots", "2"],
            {"source": "fake", "name": "pretend", "slots": 2, "replicas": 1,
             "options": {"tokens_per_s": 50, "error_after": 2.5, "hang": True}},
        ),
    ],
)  # fmt: skip
def test_adding_a_model_asks_for_what_the_flags_say(
    tmp_path: Path, arguments: list[str], wanted: dict[str, object]
) -> None:
    with home_with(tmp_path) as server:
        assert run(["models", "add", *arguments, "--no-wait", "--home", str(tmp_path)]) == 0
    assert bodies(server, "/api/models") == [wanted]


def test_adding_a_file_sends_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with home_with(tmp_path) as server:
        flags = ["--context", "8k", "--name", "m", "--option", "embedding=true"]
        assert run(["models", "add", "weights.gguf", *flags, "--home", str(tmp_path)]) == 0
    assert bodies(server, "/api/models") == [
        {
            "source": "file",
            "path": str(tmp_path / "weights.gguf"),
            "name": "m",
            "context_tokens": 8192,
            "replicas": 1,
            "options": {"embedding": True},
        }
    ]


def test_a_file_that_is_not_there_is_answered_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"")
    with home_with(tmp_path) as server:
        assert run(["models", "add", str(tmp_path / "wieghts.gguf"), "--home", str(tmp_path)]) == 3
        assert bodies(server, "/api/models") == []
    assert f"Did you mean {tmp_path / 'weights.gguf'}?" in capsys.readouterr().err


def test_a_new_key_is_alone_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with home_with(tmp_path) as server:
        arguments = ["keys", "create", "notebook", "--scope", "infer,read", "--expires", "30d", "--home", str(tmp_path)]
        assert run(arguments) == 0
    assert capsys.readouterr().out == "fm_AAAAAAAA_text_check\n"
    assert bodies(server, "/api/keys") == [
        {"name": "notebook", "scopes": ["infer", "read"], "models": [], "expires_in_s": 30 * 86400}
    ]


@pytest.mark.parametrize(("key", "code"), [("AAAAAAAA", 0), ("notebook", 0), ("twice", 5), ("old", 3), ("notebok", 3)])
def test_a_key_is_revoked_by_its_id_or_a_name_that_is_its_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, code: int
) -> None:
    with home_with(tmp_path) as server:
        assert run(["keys", "revoke", key, "--home", str(tmp_path)]) == code
    deleted = [path for method, path, _ in server.asked if method == "DELETE"]
    assert deleted == (["/api/keys/AAAAAAAA"] if code == 0 else [])
    if key == "notebok":
        assert "Did you mean notebook?" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["30", "d", "0d", "-1d", "3y", ""])
def test_a_lifetime_needs_a_number_and_a_unit(wrong: str) -> None:
    assert run(["keys", "create", "x", "--expires", wrong]) == 2


def test_a_replicas_log_is_found_by_the_beginning_of_its_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with home_with(tmp_path):
        assert run(["logs", "--replica", "m-11", "--home", str(tmp_path)]) == 0
        assert capsys.readouterr().out == "one\ntwo\n"
        assert run(["logs", "--replica", "m-1", "--home", str(tmp_path)]) == 5
        assert "m-1111 or m-1222" in capsys.readouterr().err
        assert run(["logs", "--replica", "x", "--home", str(tmp_path)]) == 3


def test_without_a_server_the_last_ones_log_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("first\nlast\n")
    assert run(["logs", "-n", "1", "--home", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "last\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["ask", "x"],
        ["chat"],
        ["models", "ls"],
        ["models", "rm", "x"],
        ["keys", "ls"],
        ["logs", "--replica", "x"],
    ],
)
def test_without_a_server_a_command_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run([*arguments, "--home", str(tmp_path)]) == 6
    assert "fleetmind up" in capsys.readouterr().err
    assert run([*arguments, "--json", "--home", str(tmp_path)]) == 6
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["error"]["exit"]) == ("", 6)


def test_stopping_what_does_not_run_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["down", "--json", "--home", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": False, "was_running": False}


def test_a_second_start_on_a_home_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with home_with(tmp_path) as server:
        assert run(["up", "--home", str(tmp_path)]) == 5
        assert run(["up", "--detach", "--home", str(tmp_path)]) == 5
    assert server.asked == []
    assert "fleetmind down" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--set", "server.prot=1"], "server.port"), (["--port", "99999"], "server.port"), (["--set", "x"], "NAME=VALUE")],
)
def test_a_wrong_setting_is_refused_with_what_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], name: str
) -> None:
    assert run(["up", *arguments, "--home", str(tmp_path)]) in (2, 78)
    assert name in capsys.readouterr().err


def test_config_show_says_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fleetmind.toml").write_text("[server]\nport = 9300\n")
    monkeypatch.setenv("FLEETMIND_LOGS_LEVEL", "debug")
    assert run(["config", "show", "--set", "models.slots=2", "--json", "--home", str(tmp_path)]) == 0
    values = {value["name"]: value for value in json.loads(capsys.readouterr().out)["values"]}
    assert (values["server.port"]["value"], values["server.port"]["source"]) == (9300, "file")
    assert values["server.port"]["where"].endswith("fleetmind.toml:2")
    assert (values["logs.level"]["source"], values["logs.level"]["where"]) == ("environment", "FLEETMIND_LOGS_LEVEL")
    assert values["models.slots"]["source"] == "flag"
    assert values["store.url"]["source"] == "default"


def test_config_show_knows_single_settings_sections_and_near_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "show", "logs", "--json", "--home", str(tmp_path)]) == 0
    assert [value["name"] for value in json.loads(capsys.readouterr().out)["values"]] == ["logs.level", "logs.format"]
    assert run(["config", "show", "logs.levle", "--home", str(tmp_path)]) == 3
    assert "logs.level" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.delenv("_FLEETMIND_COMPLETE", raising=False)
    assert run(["completion", shell]) == 0
    assert "_FLEETMIND_COMPLETE" in capsys.readouterr().out


def test_a_mistyped_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["modles"]) == 2
    assert "Did you mean 'models'?" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from fleetmind import __version__

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fleetmind {__version__}\n"
    assert run(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == __version__
