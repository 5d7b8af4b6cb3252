"""The client turns whatever comes into a result, the server's own words, or Unreachable."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.unit.cli.answering import TOKEN, answering, part, problem, stream_of

from fleetmind.cli.client import Client, refusal
from fleetmind.cli.exits import ServerRefused, Unreachable
from fleetmind.cli.presence import Running


@contextmanager
def streaming(content: bytes) -> Iterator[Iterator[dict[str, Any]]]:
    with (
        answering(lambda *_: (200, content)) as server,
        Client(server.running).stream("/v1/chat/completions", {}) as events,
    ):
        yield events


def test_it_asks_with_the_token_of_this_start_and_only_given_values() -> None:
    with answering(lambda *_: (200, {"ok": True})) as server:
        assert Client(server.running).get("/api/logs", lines=5, kind=None) == {"ok": True}
    assert server.asked == [("GET", "/api/logs?lines=5", None)]
    assert server.authorizations == [f"Bearer {TOKEN}"]


def test_names_in_paths_can_not_become_other_paths() -> None:
    with answering(lambda *_: (204, None)) as server:
        Client(server.running).delete("/api/models", "../keys/a b?c")
    assert server.asked[0][1] == "/api/models/..%2Fkeys%2Fa%20b%3Fc"


def test_a_refusal_keeps_the_servers_words() -> None:
    said = problem("model_not_found", "No such model. Look again.", hint="Look again.", near=["a"], param="model")
    with answering(lambda *_: (404, said)) as server, pytest.raises(ServerRefused) as raised:
        Client(server.running).post("/v1/chat/completions", {})
    error = raised.value
    assert (error.message, error.hint, error.code, error.near) == (
        "No such model.", "Look again.", "model_not_found", ("a",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [(401, b"", "invalid_api_key"), (404, b"<html>", "not_found"), (409, b"[]", "conflict"), (500, b"null", "error")],
)
def test_a_refusal_that_can_not_be_read_still_has_a_code(status: int, body: bytes, code: str) -> None:
    assert refusal(status, body).code == code


def test_nobody_listening_is_unreachable_and_says_where_to_look() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unreachable, match=str(port)) as raised:
        Client(Running(f"http://127.0.0.1:{port}", 1, 0.0, TOKEN)).get("/health")
    assert "fleetmind" in raised.value.hint


def test_an_answer_that_is_no_json_is_unreachable() -> None:
    with answering(lambda *_: (200, b"hello")) as server, pytest.raises(Unreachable):
        Client(server.running).get("/health")


def test_a_stream_gives_its_events_until_the_end_mark() -> None:
    whole = b": a comment\n\n" + stream_of(part("a"), part("b"))
    with streaming(whole) as events:
        assert [event["choices"][0]["delta"]["content"] for event in events] == ["a", "b"]


def test_an_error_in_a_stream_is_raised_after_what_came_before() -> None:
    broken = stream_of(part("a"), problem("stream_broken", "the engine broke", origin="engine"))
    with streaming(broken) as events:
        assert next(events) == part("a")
        with pytest.raises(ServerRefused, match="the engine broke"):
            next(events)


def test_a_stream_that_ends_without_its_mark_is_not_taken_for_whole() -> None:
    cut = stream_of(part("a"), is_whole=False)
    with streaming(cut) as events, pytest.raises(Unreachable, match="end mark"):
        list(events)


def test_a_fault_of_the_reader_is_not_called_the_servers() -> None:
    with pytest.raises(BrokenPipeError), streaming(stream_of(part("a"))):
        raise BrokenPipeError
