"""How a command ends: the one mapping from what went wrong to an exit code and to words.

Pure. Every code below is a promise to scripts (docs/command-line.md). An error says what happened and why, then the
next command to type; a mistyped name is answered with the nearest ones.
"""

from collections.abc import Mapping
from enum import IntEnum

from fleetmind.core.errors import CapacityError, FleetmindError, NotFound

ORIGIN_ENGINE = "engine"


class Exit(IntEnum):
    """What a script may rely on."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_ALLOWED = 4
    CONFLICT = 5
    UNREACHABLE = 6
    CONFIGURATION = 78
    INTERRUPTED = 130


_EXITS: Mapping[str, Exit] = {
    "invalid_value": Exit.USAGE,
    "not_found": Exit.NOT_FOUND,
    "model_not_found": Exit.NOT_FOUND,
    "invalid_api_key": Exit.NOT_ALLOWED,
    "forbidden": Exit.NOT_ALLOWED,
    "conflict": Exit.CONFLICT,
    "unreachable": Exit.UNREACHABLE,
    "invalid_configuration": Exit.CONFIGURATION,
}


class Unreachable(FleetmindError):
    """No server runs on this home, or it does not answer."""

    code = "unreachable"


class ServerRefused(FleetmindError):
    """What the server answered instead of a result; ``code``, ``origin`` and ``near`` are its own words.

    ``retry_after_s`` is there when asking again later helps.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str = "",
        param: str | None = None,
        near: tuple[str, ...] = (),
        origin: str = "gateway",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint, param=param)
        self.code = code
        self.near = near
        self.origin = origin
        self.retry_after_s = retry_after_s


def exit_of(error: FleetmindError) -> Exit:
    """The exit code for ``error``."""
    return _EXITS.get(error.code, Exit.FAILURE)


def words_of(error: FleetmindError) -> str:
    """The error for a person: what and why, then what to do next."""
    origin = " (said by the engine)" if isinstance(error, ServerRefused) and error.origin == ORIGIN_ENGINE else ""
    lines = [f"error: {error.message}{origin}"]
    near = error.near if isinstance(error, NotFound | ServerRefused) else ()
    if near and near[0].casefold() not in error.hint.casefold():
        lines.append(f"  Did you mean {' or '.join(near)}?")
    if error.hint:
        lines.append(f"  {_sentence(error.hint)}")
    return "\n".join(lines)


def document_of(error: FleetmindError) -> dict[str, object]:
    """The error for a program: what ``--json`` prints on standard error."""
    problem: dict[str, object] = {"message": error.message, "code": error.code, "exit": int(exit_of(error))}
    if error.hint:
        problem["hint"] = error.hint
    if error.param:
        problem["param"] = error.param
    if isinstance(error, NotFound | ServerRefused) and error.near:
        problem["near"] = list(error.near)
    if isinstance(error, ServerRefused):
        problem["origin"] = error.origin
    if isinstance(error, CapacityError | ServerRefused) and error.retry_after_s is not None:
        problem["retry_after_s"] = error.retry_after_s
    return {"error": problem}


def _sentence(text: str) -> str:
    """``text`` with a capital, unless it begins with what is to be typed."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.isalpha() and first not in ("fleetmind", "pip", "chmod") else text
