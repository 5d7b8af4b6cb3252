"""The one tree of errors.

    FleetmindError                 what happened, a stable code, and what to do next
    ├── CallerError                the caller's fault: asking again unchanged fails again
    │   ├── InvalidRequest         a value that can't be used; ``param`` names it
    │   │   └── ContextExceeded    prompt or wanted tokens larger than the model's context
    │   ├── PayloadTooLarge        a body over the limit
    │   ├── BodyTimeout            a body that arrived too slowly
    │   ├── Unauthenticated        no key, or one that isn't valid
    │   ├── Forbidden              a valid key without the right
    │   ├── NotFound               no such thing; ``near`` holds the closest names
    │   │   └── ModelNotFound
    │   ├── Conflict               contradicts what is there
    │   ├── ConfigurationError     a configuration value that can't be used
    │   └── InvalidModelFile       a model file that is damaged, hostile or of an unknown format
    ├── CapacityError              not now: try again after ``retry_after_s``
    │   ├── QueueFull              the model's queue is at its bound
    │   ├── QueueTimeout           waited for a slot as long as allowed
    │   └── ModelUnavailable       no replica is ready: loading, failed or fits nowhere
    ├── EngineError                an inference server's fault
    │   ├── EngineStartFailed      it did not become ready
    │   ├── EngineFailed           it broke before the first token
    │   ├── EngineRefused          it answered with an error of its own; ``status`` and ``body`` are what it said
    │   └── StreamBroken           it broke after the first token
    └── InternalError              ours
        ├── StoreError             the database refused (disk full, locked, unreachable)
        └── JournalBroken          the journal's hash chain doesn't hold

Which HTTP status a code becomes is the api's business (``api/problems.py``). Every bound that is hit raises a
CapacityError, so that a caller always learns when to come back.
"""

from collections.abc import Sequence


class FleetmindError(Exception):
    """Something went wrong in a way we know.

    ``message`` says what and why, ``hint`` what to do next; ``code`` is stable and safe to match on.
    """

    code = "error"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param


class CallerError(FleetmindError):
    """The caller's fault: asking again unchanged fails again."""

    code = "invalid_request"


class InvalidRequest(CallerError):
    """A value that can't be used; ``param`` names it."""

    code = "invalid_value"


class ContextExceeded(InvalidRequest):
    """Prompt, or prompt and wanted tokens, larger than the model's context."""

    code = "context_length_exceeded"


class PayloadTooLarge(CallerError):
    """A body over the limit."""

    code = "payload_too_large"


class BodyTimeout(CallerError):
    """A body that arrived too slowly."""

    code = "body_timeout"


class Unauthenticated(CallerError):
    """No key, or one that isn't valid. Never says which."""

    code = "invalid_api_key"


class Forbidden(CallerError):
    """A valid key without the right, or a request from a page that may not ask."""

    code = "forbidden"


class NotFound(CallerError):
    """No such thing. ``near`` holds the closest names, best first."""

    code = "not_found"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None, near: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint, param=param)
        self.near = tuple(near)


class ModelNotFound(NotFound):
    """No model of that name."""

    code = "model_not_found"


class Conflict(CallerError):
    """Contradicts what is there: a name taken, a port in use, a second server on one home."""

    code = "conflict"


class ConfigurationError(CallerError):
    """A configuration value that can't be used."""

    code = "invalid_configuration"


class InvalidModelFile(CallerError):
    """A model file that is damaged, hostile or of an unknown format. ``fault`` is a short stable name of what."""

    code = "invalid_model_file"

    def __init__(self, fault: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{fault}: {message}", hint=hint)
        self.fault = fault


class CapacityError(FleetmindError):
    """Not now; try again after ``retry_after_s`` seconds."""

    code = "no_capacity"

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class QueueFull(CapacityError):
    """The model's queue is at its bound."""

    code = "queue_full"


class QueueTimeout(CapacityError):
    """Waited for a slot as long as allowed."""

    code = "queue_timeout"


class ModelUnavailable(CapacityError):
    """No replica of the model is ready: it is loading, has failed, or fits nowhere. The message says which."""

    code = "model_unavailable"


class EngineError(FleetmindError):
    """An inference server's fault."""

    code = "engine_error"


class EngineStartFailed(EngineError):
    """An engine that did not become ready; the message ends with what its log said."""

    code = "engine_start_failed"


class EngineFailed(EngineError):
    """An engine that broke before the first token. Safe to try elsewhere."""

    code = "engine_failed"


class EngineRefused(EngineError):
    """An engine that answered with an error of its own. ``status`` and ``body`` are what it said."""

    code = "engine_refused"

    def __init__(self, message: str, *, status: int, body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class StreamBroken(EngineError):
    """An engine that broke after the first token. The client has a part of the answer and must be told."""

    code = "stream_broken"


class InternalError(FleetmindError):
    """Ours."""

    code = "internal_error"


class StoreError(InternalError):
    """The database refused: disk full, locked, unreachable."""

    code = "store_error"


class JournalBroken(InternalError):
    """The journal's hash chain doesn't hold; the message names the first bad row."""

    code = "journal_broken"
