"""Exit codes and words are promises to scripts and to people."""

import pytest

from fleetmind.cli.exits import Exit, ServerRefused, Unreachable, document_of, exit_of, words_of
from fleetmind.core import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigurationError("x"), 78),
        (errors.NotFound("x"), 3),
        (errors.ModelNotFound("x"), 3),
        (errors.Unauthenticated("x"), 4),
        (errors.Forbidden("x"), 4),
        (errors.Conflict("x"), 5),
        (Unreachable("x"), 6),
        (errors.InvalidRequest("x"), 2),
        (errors.InvalidModelFile("truncated", "x"), 1),
        (errors.EngineFailed("x"), 1),
        (errors.StoreError("x"), 1),
        (ServerRefused("x", code="model_not_found"), 3),
        (ServerRefused("x", code="conflict"), 5),
        (ServerRefused("x", code="something_new"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: errors.FleetmindError, code: int) -> None:
    assert exit_of(error) == code


def test_the_codes_are_those_of_the_documentation() -> None:
    assert {code.name: int(code) for code in Exit} == {
        "OK": 0, "FAILURE": 1, "USAGE": 2, "NOT_FOUND": 3, "NOT_ALLOWED": 4, "CONFLICT": 5, "UNREACHABLE": 6,
        "CONFIGURATION": 78, "INTERRUPTED": 130,
    }  # fmt: skip


def test_words_say_what_then_near_names_then_the_next_command() -> None:
    error = errors.ModelNotFound("there is no model 'smol'", hint="fleetmind models ls", near=("smollm", "smalla"))
    assert words_of(error) == (
        "error: there is no model 'smol'\n  Did you mean smollm or smalla?\n  fleetmind models ls"
    )


def test_a_near_name_that_the_hint_already_gives_is_not_repeated() -> None:
    error = errors.ModelNotFound("no model", hint="did you mean smollm?", near=("smollm",))
    assert words_of(error).splitlines() == ["error: no model", "  Did you mean smollm?"]


def test_an_engine_is_named_as_the_one_who_complains() -> None:
    assert "(said by the engine)" in words_of(ServerRefused("context too long", code="x", origin="engine"))


def test_an_error_for_programs_carries_everything_but_nothing_empty() -> None:
    error = ServerRefused("busy", code="queue_full", near=("a",), retry_after_s=2.0)
    assert document_of(error) == {
        "error": {
            "message": "busy", "code": "queue_full", "exit": 1, "near": ["a"], "origin": "gateway",
            "retry_after_s": 2.0,
        }
    }  # fmt: skip
