"""Waiting for a model ends when it is ready, and at once when waiting would not help."""

import io
from typing import Any

import pytest
from tests.unit.cli.answering import Reply, Script, answering, model

from fleetmind.cli.client import Client
from fleetmind.cli.exits import ServerRefused
from fleetmind.cli.output import Output
from fleetmind.cli.talking import patiently
from fleetmind.cli.waiting import REMOTE_LOOKS_MAX, UNPLACED_LOOKS_MAX, until_ready


def states(*shown: dict[str, Any], refusals: list[dict[str, Any]] | None = None) -> Script:
    """A server whose catalogue shows one state after the other, the last one for ever."""
    left = list(shown)

    def script(method: str, path: str, body: Any) -> Reply:
        if path == "/api/models":
            return 200, {"models": [left.pop(0) if len(left) > 1 else left[0]]}
        if path == "/api/placement":
            return 200, {"refusals": refusals or []}
        return 200, {"replicas": [{"model": "m", "reason": "reading the file", "created_at_s": 1.0}]}

    return script


def quiet() -> tuple[Output, io.StringIO]:
    err = io.StringIO()
    return Output(out=io.StringIO(), err=err, environ={}), err


def test_it_tells_what_it_waits_for_until_the_model_is_ready() -> None:
    output, err = quiet()
    pauses: list[float] = []
    with answering(states(model("m", "loading"), model("m", "loading"), model("m"))) as server:
        assert until_ready(Client(server.running), "m", output, wait=pauses.append)["state"] == "ready"
    assert len(pauses) == 2
    assert "reading the file" in err.getvalue()


def test_a_failed_model_ends_the_wait_with_its_reason() -> None:
    with (
        answering(states(model("m", "failed", reason="it is damaged"))) as server,
        pytest.raises(ServerRefused, match="it is damaged"),
    ):
        until_ready(Client(server.running), "m", quiet()[0], wait=lambda _: None)


def test_a_model_that_fits_nowhere_ends_the_wait_with_a_reason_per_device() -> None:
    refusals = [{"model": "m", "device": "gpu-0", "message": "needs 9 GiB, 4 GiB free"}]
    pauses: list[float] = []
    with (
        answering(states(model("m", "unplaced"), refusals=refusals)) as server,
        pytest.raises(ServerRefused, match="gpu-0: needs 9 GiB"),
    ):
        until_ready(Client(server.running), "m", quiet()[0], wait=pauses.append)
    assert len(pauses) == UNPLACED_LOOKS_MAX


def test_a_remote_server_that_is_down_is_not_waited_for_for_ever() -> None:
    pauses: list[float] = []
    with (
        answering(states(model("m", "loading", source="remote"))) as server,
        pytest.raises(ServerRefused, match="again and again"),
    ):
        until_ready(Client(server.running), "m", quiet()[0], wait=pauses.append)
    assert len(pauses) == REMOTE_LOOKS_MAX


def test_a_model_that_was_removed_meanwhile_ends_the_wait() -> None:
    with answering(states(model("other"))) as server, pytest.raises(ServerRefused) as raised:
        until_ready(Client(server.running), "m", quiet()[0], wait=lambda _: None)
    assert raised.value.code == "model_not_found"


def loading() -> ServerRefused:
    return ServerRefused("m is loading", code="model_unavailable", retry_after_s=2.0)


def test_asking_goes_on_as_long_as_the_server_says_when_to_come_back() -> None:
    answers: list[Any] = [loading(), loading(), "hello"]
    pauses: list[float] = []

    def ask_once() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    with answering(states(model("m", "loading"))) as server:
        client = Client(server.running)
        assert patiently(ask_once, client, "m", quiet()[0], 60.0, wait=pauses.append) == "hello"
    assert pauses == [2.0, 2.0]


def test_asking_ends_at_once_when_the_model_has_failed() -> None:
    def ask_once() -> str:
        raise loading()

    with (
        answering(states(model("m", "failed", reason="no memory"))) as server,
        pytest.raises(ServerRefused, match="no memory"),
    ):
        patiently(ask_once, Client(server.running), "m", quiet()[0], 60.0, wait=lambda _: None)


def test_a_refusal_that_time_does_not_mend_is_not_asked_again() -> None:
    asked = []

    def ask_once() -> str:
        asked.append(1)
        raise ServerRefused("wrong", code="invalid_value")

    with answering(states(model("m"))) as server, pytest.raises(ServerRefused, match="wrong"):
        patiently(ask_once, Client(server.running), "m", quiet()[0], 60.0)
    assert len(asked) == 1


def test_asking_ends_when_the_time_given_is_up() -> None:
    def ask_once() -> str:
        raise loading()

    with answering(states(model("m", "loading"))) as server, pytest.raises(ServerRefused, match="is loading"):
        patiently(ask_once, Client(server.running), "m", quiet()[0], 0.0)
    assert server.asked == []
