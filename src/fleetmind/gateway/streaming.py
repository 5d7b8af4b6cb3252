"""Server-sent events, without I/O: an engine's bytes in, whole checked events out.

Pure. ``EventStream`` folds the bytes that happened to arrive together into whole events, finds the usage, notices the
end, an engine's error and garbage, and hides the usage event that the gateway asked for and the client did not. It
passes events on byte for byte and holds back no more than one unfinished event.
"""

import msgspec

from fleetmind.core.errors import StreamBroken
from fleetmind.gateway.calls import Usage, usage_of

EVENT_BYTES_MAX = 4 * 1024 * 1024
"""The largest single event that is believed; a larger one is garbage."""

DONE_EVENT = b"data: [DONE]\n\n"


class _DeltaUsage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


class _Delta(msgspec.Struct):
    usage: _DeltaUsage | None = None
    choices: list[msgspec.Raw] | None = None
    error: msgspec.Raw | None = None


_delta = msgspec.json.Decoder(_Delta)


class EventStream:
    """The events of one streamed answer.

    ``usage`` is what the engine reported so far, ``events`` how many data events passed, ``is_done`` whether the end
    was announced, ``fault`` what is wrong with the stream: nothing after a fault is passed on.
    """

    __slots__ = ("_hides_usage", "_rest", "events", "fault", "is_done", "usage")

    def __init__(self, *, hides_usage: bool) -> None:
        self._hides_usage = hides_usage
        self._rest = b""
        self.usage: Usage | None = None
        self.events = 0
        self.is_done = False
        self.fault: StreamBroken | None = None

    def feed(self, data: bytes) -> bytes:
        """The whole events that ``data`` completes, to be sent on as they are; empty if none. Then see ``fault``."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        self._rest = data[end:]
        if len(self._rest) > EVENT_BYTES_MAX:
            self.fault = _broken(f"The engine sent an event of more than {EVENT_BYTES_MAX} bytes.")
        if not end:
            return b""
        whole = data if end == len(data) else data[:end]
        body = whole
        if body.endswith(DONE_EVENT):
            self.is_done = True
            body = body[: -len(DONE_EVENT)]
        if not body:
            return whole
        # An ordinary piece is checked by one call: its events become lines of JSON. A raw line break can't stand inside
        # JSON text, so the cut is exact; whatever isn't ordinary fails to decode and is looked at one by one.
        try:
            if not body.startswith(b"data: "):
                return self._one_by_one(whole)
            deltas = _delta.decode_lines(body[6:].replace(b"\n\ndata: ", b"\n"))
        except (msgspec.DecodeError, RecursionError):
            return self._one_by_one(whole)
        marked = [i for i, delta in enumerate(deltas) if delta.usage is not None or delta.error is not None]
        if not marked:
            self.events += len(deltas)
            return whole
        if marked != [len(deltas) - 1] or deltas[-1].error is not None:
            return self._one_by_one(whole)
        self.events += len(deltas)  # the usual end: usage on the last event and nowhere else
        if not self._hides(deltas[-1]):
            return whole
        before = body.rfind(b"\n\n", 0, -2)
        return (body[: before + 2] if before >= 0 else b"") + whole[len(body) :]

    def close(self, reason: str | None = None) -> StreamBroken | None:
        """What is wrong with a stream that has ended, None if nothing is. ``reason`` is why the connection broke."""
        if self.fault is None and reason is not None and not self.is_done:
            self.fault = _broken(reason)
        if self.fault is None and self._rest.strip():
            self.fault = _broken("The engine closed the stream in the middle of an event.")
        if self.fault is None and not self.is_done:
            self.fault = _broken("The engine closed the stream before its end.")
        return self.fault

    def _one_by_one(self, whole: bytes) -> bytes:
        passed: list[bytes] = []
        for event in whole.split(b"\n\n"):
            if event.strip() and self._passes(event):
                passed.append(event + b"\n\n")
            if self.fault is not None:
                self._rest = b""
                break
        return b"".join(passed)

    def _passes(self, event: bytes) -> bool:
        """Whether the client is to see ``event``; sets ``fault``, ``usage`` and ``is_done``."""
        data = b"\n".join(line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
        if not data:
            if event.startswith(b"error:"):
                self.fault = _broken(f"The engine reported an error: {_text(event[6:])}")
            elif not event.startswith((b":", b"event:", b"id:", b"retry:")):
                self.fault = _broken(f"The engine sent something that is not an event: {_text(event)}")
            return self.fault is None
        if data == b"[DONE]":
            self.is_done = True
            return True
        try:
            delta = _delta.decode(data)
        except (msgspec.DecodeError, RecursionError):
            self.fault = _broken(f"The engine sent an event that is not JSON: {_text(data)}")
            return False
        if delta.error is not None and bytes(delta.error) != b"null":
            self.fault = _broken(f"The engine reported an error: {_text(bytes(delta.error))}")
            return False
        self.events += 1
        return not self._hides(delta)

    def _hides(self, delta: _Delta) -> bool:
        """Whether the client is not to see this event, which it did not ask for; keeps its usage."""
        if delta.usage is None:
            return False
        self.usage = usage_of(delta.usage.prompt_tokens, delta.usage.completion_tokens)
        return self._hides_usage and not delta.choices


def _broken(message: str) -> StreamBroken:
    return StreamBroken(message, hint="The answer so far is incomplete; ask again.")


def _text(data: bytes) -> str:
    """The start of something an engine sent, safe to show."""
    return data[:200].decode(errors="replace").strip()


def error_event(problem: bytes) -> bytes:
    """The event that ends a broken stream; ``problem`` is the error as JSON. No [DONE] follows, so that no client takes
    the answer for a whole one."""
    return b"data: " + problem + b"\n\n"
