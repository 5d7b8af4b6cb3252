import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.errors import ContextExceeded, FleetmindError, InvalidRequest, PayloadTooLarge
from fleetmind.core.types import CallId, KeyId
from fleetmind.gateway.calls import (
    Call,
    CallKind,
    Usage,
    check_fits_context,
    engine_body,
    model_not_found,
    parse_call,
    usage_of_reply,
)


def parse(body: object, kind: CallKind = CallKind.CHAT) -> Call:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_call(kind, data, call_id=CallId("c"), key_id=KeyId("k"), received_ns=0, messages_max=10)


def chat(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields


def test_a_chat_call_keeps_the_clients_bytes() -> None:
    body = b'{ "model":"m",  "messages":[{"role":"user","content":[{"type":"text","text":"h\xc3\xa9"}]}],"grammar":1e3}'
    call = parse(body)
    assert (call.model, call.is_stream, call.max_tokens) == ("m", False, None)
    assert engine_body(call, None) is call.body == body


def test_null_is_taken_as_left_out() -> None:
    call = parse(chat(max_tokens=None, stream=None, n=None, temperature=None, stop=None, tools=None))
    assert (call.max_tokens, call.is_stream) == (None, False)


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert parse(chat(max_tokens=5, max_completion_tokens=7)).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [1]}, "messages[0]"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"temperature": "hot"}, "temperature"),
        ({"tools": {}}, "tools"),
        ({"stop": 3}, "stop"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(chat(**fields))
    assert refused.value.param == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"{'model':1}", b"\x00", b'{"model":"m"}', b"[" * 100_000]
)
def test_what_is_not_a_call_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body)


def test_deep_nesting_is_refused_and_not_followed() -> None:
    deep = b'{"model":"m","messages":[{"role":"user","content":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}]}"
    with pytest.raises(InvalidRequest, match="nested too deep"):
        parse(deep)


def test_text_that_is_not_utf8_is_refused_wherever_it_stands() -> None:
    with pytest.raises(InvalidRequest, match="UTF-8 at byte"):
        parse(b'{"model":"m","messages":[{"role":"user","content":"\xff\xfe"}]}')


def test_more_messages_than_allowed_are_refused() -> None:
    with pytest.raises(PayloadTooLarge, match="11 messages"):
        parse(chat(messages=[{"role": "user", "content": ""}] * 11))


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_every_form_of_prompt_and_input_is_accepted(prompt: object) -> None:
    assert parse({"model": "m", "prompt": prompt}, CallKind.COMPLETION).model == "m"
    assert parse({"model": "m", "input": prompt}, CallKind.EMBEDDING).model == "m"


@pytest.mark.parametrize("prompt", [None, [], 5, {}, [None], [["a"]], [True]])
def test_other_forms_are_refused(prompt: object) -> None:
    for kind, name in ((CallKind.COMPLETION, "prompt"), (CallKind.EMBEDDING, "input")):
        with pytest.raises(InvalidRequest) as refused:
            parse({"model": "m", name: prompt}, kind)
        assert refused.value.param == name


def test_a_stream_is_asked_for_its_usage_and_nothing_else_changes() -> None:
    call = parse(chat(stream=True, stream_options={"include_usage": False}, seed=7))
    sent = json.loads(engine_body(call, None))
    assert sent == chat(stream=True, stream_options={"include_usage": True}, seed=7)
    asked = parse(chat(stream=True, stream_options={"include_usage": True}))
    assert asked.wants_usage
    assert engine_body(asked, None) is asked.body


def test_a_remote_model_goes_by_its_name_there() -> None:
    assert json.loads(engine_body(parse(chat()), "theirs")) == chat(model="theirs")


def test_numbers_pass_through_as_they_were_written() -> None:
    call = parse(b'{"model":"m","messages":[{"role":"user","content":"x"}],"logit_bias":{"5":1.0000000000000000001e3}}')
    assert b"1.0000000000000000001e3" in engine_body(call, "theirs")


def test_wanting_more_than_the_context_is_refused_unless_it_is_unknown() -> None:
    call = parse(chat(max_tokens=4097))
    with pytest.raises(ContextExceeded, match="context of 4096"):
        check_fits_context(call, 4096)
    check_fits_context(call, 4097)
    check_fits_context(call, 0)


def test_usage_is_read_from_a_reply() -> None:
    assert usage_of_reply(b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"x":1}}') == Usage(3, 4)
    assert usage_of_reply(b'{"usage":null}') is None
    with pytest.raises(ValueError):
        usage_of_reply(b"<html>")


def test_an_unknown_model_is_answered_with_near_names() -> None:
    error = model_not_found("SmolLM2-135m", ["smollm2-135m-instruct", "qwen"])
    assert error.near[0] == "smollm2-135m-instruct"
    assert "Did you mean smollm2-135m-instruct" in error.hint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["model", "messages", "stream", "max_tokens", "n", "tools", "stop", "prompt", "input", "seed"])


@given(st.dictionaries(names, json_values), st.sampled_from(CallKind))
def test_any_json_object_is_either_a_call_or_refused_in_words(fields: dict[str, object], kind: CallKind) -> None:
    try:
        call = parse(fields, kind)
    except FleetmindError:
        return
    assert call.model == fields["model"]
    assert json.loads(engine_body(call, "theirs"))["model"] == "theirs"


@given(st.binary(max_size=200), st.sampled_from(CallKind))
def test_any_bytes_are_refused_in_words(body: bytes, kind: CallKind) -> None:
    with pytest.raises(FleetmindError):
        parse(body, kind)
