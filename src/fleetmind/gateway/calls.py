"""The one internal form of a call to a model, and of its answer.

Pure. A client's body is checked once, here, for what the gateway itself must know; everything else in it is the
engine's business and passes through byte for byte. The body is never rebuilt unless a field of it must change.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from fleetmind.core.errors import ContextExceeded, InvalidRequest, ModelNotFound, PayloadTooLarge
from fleetmind.core.types import CallId, KeyId, ModelName, ReplicaId
from fleetmind.node.protocol import Ability


class CallKind(StrEnum):
    """What is asked of a model; the value is the path below ``/v1/``."""

    CHAT = "chat/completions"
    COMPLETION = "completions"
    EMBEDDING = "embeddings"


ABILITY_NEEDED = {
    CallKind.CHAT: Ability.CHAT,
    CallKind.COMPLETION: Ability.COMPLETION,
    CallKind.EMBEDDING: Ability.EMBEDDING,
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a call used, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


TOKENS_MAX = 2**40
"""The largest number of tokens that is believed of one call: neither counters nor the database take every number."""


def usage_of(prompt_tokens: int | None, completion_tokens: int | None) -> Usage:
    """What an engine reported, within what a count of tokens can be."""
    prompt, completion = (min(max(count or 0, 0), TOKENS_MAX) for count in (prompt_tokens, completion_tokens))
    return Usage(prompt, completion)


class Call(msgspec.Struct, frozen=True):
    """One request to a model. A Struct like ``Served``, made in a tenth of a dataclass's time: each call makes one.

    ``body`` is the client's JSON, unchanged. ``wants_usage`` says whether a streaming client asked for the usage event;
    ``max_tokens`` is None where the client set no bound. ``received_ns`` is the monotonic clock. ``hops`` counts the
    other Fleetmind servers that the call came through.
    """

    id: CallId
    kind: CallKind
    model: ModelName
    body: bytes
    is_stream: bool
    wants_usage: bool
    max_tokens: int | None
    key_id: KeyId
    received_ns: int
    hops: int = 0


class Served(msgspec.Struct, frozen=True):
    """Who served a call: told to the client in headers."""

    model: ModelName
    replica: ReplicaId
    queue_s: float
    is_simulated: bool = False


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Message(msgspec.Struct):
    role: str


class _Bounds(msgspec.Struct):
    """The fields that every generating call may carry and whose type we check before an engine sees them."""

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    top_logprobs: int | None = None
    n_probs: int | None = None
    stop: str | list[str] | None = None
    user: str | None = None


class _Chat(_Bounds):
    messages: list[_Message] = msgspec.field(default_factory=list)
    max_completion_tokens: int | None = None
    tools: list[dict[str, msgspec.Raw]] | None = None


class _Completion(_Bounds):
    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    logprobs: bool | int | None = None


class _Embedding(msgspec.Struct):
    model: str
    input: str | list[str] | list[int] | list[list[int]]


class _Reply(msgspec.Struct):
    usage: "_ReplyUsage | None" = None


class _ReplyUsage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


_chat = msgspec.json.Decoder(_Chat)
# msgspec can't tell the arms of a union of lists apart, so those fields are decoded loosely and checked below.
_completion = msgspec.json.Decoder(
    msgspec.defstruct(
        "_CompletionLoose", [("prompt", Any, None), ("logprobs", bool | int | None, None)], bases=(_Bounds,)
    )
)
_embedding = msgspec.json.Decoder(msgspec.defstruct("_EmbeddingLoose", [("model", str), ("input", Any)]))
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_reply = msgspec.json.Decoder(_Reply)
_encode = msgspec.json.Encoder().encode


def parse_call(
    kind: CallKind,
    body: bytes,
    *,
    call_id: CallId,
    key_id: KeyId,
    received_ns: int,
    messages_max: int,
    hops: int = 0,
) -> Call:
    """The Call that ``body`` asks for.

    Raises InvalidRequest, naming the field, where the body is not JSON, not UTF-8, nested too deep, or carries a value
    of the wrong type or out of range; PayloadTooLarge for more messages than ``messages_max``.
    """
    try:
        if not body.isascii():
            body.decode()
        head: Any = _DECODERS[kind].decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid UTF-8 at byte {error.start}.", hint="Send JSON in UTF-8."
        ) from None
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        param = where.rstrip("`") or None
        raise InvalidRequest(
            f"{message}{f' at {param}' if param else ''}.",
            hint="See the API reference for the fields and their types.",
            param=param,
        ) from None
    except (msgspec.DecodeError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"The body is not JSON: {why}.", hint="Send one JSON object.") from None
    if kind is CallKind.EMBEDDING:
        _check_text(head.input, "input")
        return Call(call_id, kind, ModelName(head.model), body, False, False, None, key_id, received_ns, hops)
    max_tokens = head.max_tokens
    if kind is CallKind.CHAT:
        if not head.messages:
            raise InvalidRequest("messages is missing or empty.", hint="Send at least one message.", param="messages")
        if len(head.messages) > messages_max:
            raise PayloadTooLarge(
                f"{len(head.messages)} messages, at most {messages_max} are accepted.",
                hint="Shorten the conversation, or raise server.messages_max.",
                param="messages",
            )
        if head.max_completion_tokens is not None:
            max_tokens = head.max_completion_tokens
    elif head.prompt is not None:
        _check_text(head.prompt, "prompt")
    else:
        raise InvalidRequest("prompt is missing.", hint="Send a prompt.", param="prompt")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens is {max_tokens}.", hint="Give a whole number from 1, or leave it out.", param="max_tokens"
        )
    if head.n is not None and not 1 <= head.n <= _N_MAX:
        raise InvalidRequest(f"n is {head.n}.", hint=f"Give a whole number from 1 to {_N_MAX}.", param="n")
    _check_logprobs(head)
    options = head.stream_options
    return Call(
        id=call_id,
        kind=kind,
        model=ModelName(head.model),
        body=body,
        is_stream=bool(head.stream),
        wants_usage=bool(options and options.include_usage),
        max_tokens=max_tokens,
        key_id=key_id,
        received_ns=received_ns,
        hops=hops,
    )


_DECODERS: dict[CallKind, Any] = {
    CallKind.CHAT: _chat,
    CallKind.COMPLETION: _completion,
    CallKind.EMBEDDING: _embedding,
}
_N_MAX = 128
LOGPROBS_MAX = 100
"""Alternatives per token. An engine asked for all of its vocabulary needs a hundred times the memory of the answer."""


def _check_logprobs(head: Any) -> None:
    for param in ("top_logprobs", "n_probs", "logprobs"):
        count = getattr(head, param, None)
        if count is not None and not 0 <= count <= LOGPROBS_MAX:
            raise InvalidRequest(
                f"{param} is {count}.", hint=f"Give a whole number from 0 to {LOGPROBS_MAX}.", param=param
            )


def _check_text(value: object, param: str) -> None:
    """Text, or a list of texts, token ids, or lists of token ids."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InvalidRequest(f"{param} is empty.", hint="Send at least one text.", param=param)
    for item in items:
        if isinstance(item, str) or (isinstance(value, list) and type(item) is int):
            continue
        if isinstance(value, list) and isinstance(item, list) and all(type(token) is int for token in item):
            continue
        raise InvalidRequest(
            f"{param} must be text, a list of texts or token ids, not {type(item).__name__}.",
            hint=f"Send {param} as a string.",
            param=param,
        )


def engine_body(call: Call, remote_model: str | None) -> bytes:
    """What is sent to the engine: the client's own bytes, unless the model has another name there or the usage of a
    stream must be asked for."""
    asks_usage = call.is_stream and not call.wants_usage
    if not asks_usage and remote_model is None:
        return call.body
    fields = _fields.decode(call.body)
    if remote_model is not None:
        fields["model"] = msgspec.Raw(_encode(remote_model))
    if asks_usage:
        fields["stream_options"] = _USAGE_ASKED
    return _encode(fields)


_USAGE_ASKED = msgspec.Raw(b'{"include_usage":true}')


def check_fits_context(call: Call, context_tokens: int) -> None:
    """Raise ContextExceeded if the call wants more tokens than the context holds. 0 means the context is unknown."""
    if call.max_tokens is not None and 0 < context_tokens < call.max_tokens:
        raise ContextExceeded(
            f"max_tokens is {call.max_tokens}, but {call.model} has a context of {context_tokens} tokens here.",
            hint=f"Ask for at most {context_tokens} tokens, or add the model with a larger context.",
            param="max_tokens",
        )


def usage_of_reply(body: bytes) -> Usage | None:
    """The usage that a complete JSON reply carries, None where it has none.

    Raises ValueError where the reply is not a JSON object.
    """
    try:
        usage = _reply.decode(body).usage
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return None if usage is None else usage_of(usage.prompt_tokens, usage.completion_tokens)


def model_not_found(name: str, known: Iterable[str]) -> ModelNotFound:
    """The refusal of a model nobody has heard of, with the names that come closest."""
    names = sorted(known)
    by_folded = {candidate.casefold(): candidate for candidate in names}
    near = [by_folded[match] for match in difflib.get_close_matches(name.casefold()[:200], by_folded, n=3, cutoff=0.4)]
    if near:
        hint = f"Did you mean {' or '.join(near)}?"
    else:
        hint = f"Known models: {', '.join(names[:10]) or 'none yet'}. GET /v1/models lists them."
    return ModelNotFound(f"There is no model named {name[:200]!r}.", hint=hint, param="model", near=near)
