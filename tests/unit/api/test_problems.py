import json

import pytest

from fleetmind.api.problems import body_of, headers_of, status_of
from fleetmind.core import errors
from fleetmind.core.errors import (
    CapacityError,
    EngineRefused,
    FleetmindError,
    InvalidModelFile,
    ModelNotFound,
    NotFound,
)


def kinds(root: type[FleetmindError]) -> list[type[FleetmindError]]:
    """The tree of core/errors.py, without what other packages may add below it."""
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(kind for child in children for kind in kinds(child))]


def made(kind: type[FleetmindError]) -> FleetmindError:
    if issubclass(kind, CapacityError):
        return kind("m", retry_after_s=2.5)
    if issubclass(kind, EngineRefused):
        return kind("m", status=422)
    return kind("fault", "m") if issubclass(kind, InvalidModelFile) else kind("m")


@pytest.mark.parametrize("kind", kinds(FleetmindError))
def test_every_error_has_a_status_and_openais_shape(kind: type[FleetmindError]) -> None:
    error = made(kind)
    problem = json.loads(body_of(error))["error"]
    assert {"message", "type", "param", "code", "origin"} <= set(problem)
    assert 400 <= status_of(error) < 600
    assert (status_of(error) < 500) == issubclass(kind, errors.CallerError | errors.QueueFull | EngineRefused)
    assert problem["origin"] == ("engine" if issubclass(kind, errors.EngineError) else "gateway")
    assert (b"retry-after", b"3") in headers_of(error) or not issubclass(kind, CapacityError)


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in kinds(FleetmindError) if "code" in vars(kind)]
    assert len(codes) == len(set(codes))


def test_near_names_and_hints_are_told() -> None:
    problem = json.loads(body_of(ModelNotFound("No model x.", hint="Did you mean y?", near=["y"])))["error"]
    assert problem["message"] == "No model x. Did you mean y?"
    assert problem["near"] == ["y"]
    assert status_of(NotFound("x")) == 404


@pytest.mark.parametrize(
    ("engine", "ours"), [(400, 400), (404, 404), (429, 429), (401, 502), (403, 502), (500, 502), (302, 502)]
)
def test_an_engines_refusal_of_us_is_not_the_clients(engine: int, ours: int) -> None:
    assert status_of(EngineRefused("m", status=engine)) == ours


def test_an_engine_is_quoted() -> None:
    said = {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}
    problem = json.loads(body_of(EngineRefused("m", status=400, body=json.dumps(said).encode())))["error"]
    assert (problem["message"], problem["code"], problem["origin"]) == ("too long", "context_length_exceeded", "engine")


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"error":5}', b'{"error":{"message":[]}}', b'{"error":"plain"}', b"\xff"]
)
def test_whatever_an_engine_says_becomes_an_answer(body: bytes) -> None:
    assert json.loads(body_of(EngineRefused("m", status=400, body=body)))["error"]["message"]
