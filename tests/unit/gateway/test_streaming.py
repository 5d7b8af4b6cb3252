import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.gateway.calls import Usage
from fleetmind.gateway.streaming import DONE_EVENT, EVENT_BYTES_MAX, EventStream


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}}])


USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})
WHOLE = token("a") + token("b") + USAGE + DONE_EVENT


def test_events_pass_byte_for_byte() -> None:
    stream = EventStream(hides_usage=False)
    assert stream.feed(WHOLE) == WHOLE
    assert (stream.events, stream.usage, stream.is_done, stream.close()) == (3, Usage(3, 2), True, None)


def test_the_usage_event_is_hidden_from_a_client_that_did_not_ask() -> None:
    stream = EventStream(hides_usage=True)
    assert stream.feed(WHOLE) == token("a") + token("b") + DONE_EVENT
    assert stream.usage == Usage(3, 2)


def test_usage_on_an_event_with_text_is_never_hidden() -> None:
    last = event(choices=[{"delta": {"content": "x"}}], usage={"prompt_tokens": 1, "completion_tokens": 1})
    stream = EventStream(hides_usage=True)
    assert stream.feed(last) == last
    assert stream.usage == Usage(1, 1)


def test_text_that_looks_like_usage_or_an_error_is_only_text() -> None:
    sly = token('"usage": {"prompt_tokens": 999} "error": {} data: [DONE]\n\ndata: {')
    stream = EventStream(hides_usage=True)
    assert stream.feed(sly) == sly
    assert (stream.usage, stream.fault, stream.is_done, stream.events) == (None, None, False, 1)


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12), st.booleans(), st.booleans())
def test_however_the_bytes_arrive_the_events_are_the_same(cuts: list[int], hides: bool, crlf: bool) -> None:
    whole = WHOLE.replace(b"\n", b"\r\n") if crlf else WHOLE
    bounds = [0, *sorted({min(cut, len(whole) - 1) for cut in cuts}), len(whole)]
    stream = EventStream(hides_usage=hides)
    passed = b"".join(stream.feed(whole[a:b]) for a, b in pairwise(bounds))
    assert passed == (token("a") + token("b") + DONE_EVENT if hides else WHOLE)
    assert (stream.events, stream.usage, stream.close()) == (3, Usage(3, 2), None)


def test_comments_and_named_events_pass() -> None:
    kept = b": ping\n\n" + b"event: message\ndata: {}\n\n" + DONE_EVENT
    stream = EventStream(hides_usage=True)
    assert stream.feed(kept) == kept
    assert stream.close() is None


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (b"data: {not json}\n\n", "not JSON"),
        (b"\x80\x81\x82\n\n", "not an event"),
        (b"HTTP/1.1 500\n\n", "not an event"),
        (b'data: {"error":{"message":"out of memory"}}\n\n', "out of memory"),
        (b'error: {"code":500,"message":"slot died"}\n\n', "slot died"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "not JSON"),
    ],
)
def test_nothing_passes_after_a_fault_but_all_before_it_does(bad: bytes, word: str) -> None:
    stream = EventStream(hides_usage=True)
    assert stream.feed(token("a") + bad + token("b")) == token("a")
    assert stream.fault is not None
    assert word in stream.fault.message
    assert stream.close() is stream.fault


def test_a_stream_that_ends_early_is_a_fault() -> None:
    stream = EventStream(hides_usage=True)
    stream.feed(token("a"))
    assert "before its end" in str(stream.close())
    stream = EventStream(hides_usage=True)
    stream.feed(token("a")[:-1])
    assert "middle of an event" in str(stream.close())


def test_a_broken_connection_after_the_end_does_not_matter() -> None:
    stream = EventStream(hides_usage=True)
    stream.feed(WHOLE)
    assert stream.close("the connection broke") is None


def test_an_endless_event_is_not_kept() -> None:
    stream = EventStream(hides_usage=True)
    piece = b"data: " + b"x" * (EVENT_BYTES_MAX // 4)
    for _ in range(5):
        stream.feed(piece)
    assert stream.fault is not None


@given(st.lists(st.binary(max_size=60) | st.sampled_from([token("a"), USAGE, DONE_EVENT, b"\n\n"]), max_size=10))
def test_no_bytes_make_it_raise(pieces: list[bytes]) -> None:
    stream = EventStream(hides_usage=True)
    for piece in pieces:
        stream.feed(piece)
        if stream.fault:
            break
    stream.close()
