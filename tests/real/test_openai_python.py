"""The official OpenAI client for Python against the packaged model, as a user would point it here."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
from tests.flow.child import Child
from tests.flow.service import until
from tests.real.conftest import CONTEXT_TOKENS

from fleetmind.fleet.packaged import SMOLLM2

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="session")]

MODEL = SMOLLM2.model
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
LONG = "word " * (2 * CONTEXT_TOKENS)
ONCE: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(real: Child) -> Iterator[OpenAI]:
    """A client with the key that the first start showed. Proxies of the machine are none of this test's business."""
    with OpenAI(
        base_url=f"{real.url}/v1",
        api_key=real.first_key,
        max_retries=0,
        timeout=110,
        http_client=DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def async_client(real: Child) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{real.url}/v1",
        api_key=real.first_key,
        max_retries=0,
        timeout=110,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


# Chat


async def test_chat(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ONCE)
    assert raw.headers["x-fleetmind-model"] == MODEL
    assert "x-fleetmind-simulated" not in raw.headers
    reply = raw.parse()
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 12
    assert reply.usage.prompt_tokens > 10
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


async def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ONCE)
    chunks = list(client.chat.completions.create(**ONCE, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    chunks = list(client.chat.completions.create(**ONCE, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks), "who doesn't ask for usage sees none"


async def test_the_helper_that_gathers_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(**ONCE) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content


async def test_several_calls_at_once(async_client: AsyncOpenAI) -> None:
    replies = await asyncio.gather(*(async_client.chat.completions.create(**ONCE) for _ in range(3)))
    assert len({reply.id for reply in replies}) == 3
    assert all(reply.choices[0].message.content for reply in replies)


async def test_an_async_stream_that_is_left_frees_its_slot(real: Child, async_client: AsyncOpenAI) -> None:
    endless = ONCE | {"max_tokens": CONTEXT_TOKENS, "temperature": 1, "logit_bias": {"2": -100}}  # it can't say "end"
    stream = await async_client.chat.completions.create(**endless, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await real.until_calls(outstanding=0)


async def test_a_conversation_with_a_system_message(client: OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": [{"type": "text", "text": "My name is Ada."}]},
        {"role": "assistant", "content": "Hello Ada."},
        {"role": "user", "content": "What is my name?"},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
    assert reply.choices[0].message.content, "what it says is up to so small a model"


async def test_one_seed_gives_one_answer(client: OpenAI) -> None:
    def roll(seed: int) -> str | None:
        wanted = ONCE | {"temperature": 2, "max_tokens": 8}
        return client.chat.completions.create(**wanted, seed=seed).choices[0].message.content

    assert roll(1) == roll(1)
    assert len({roll(seed) for seed in range(1, 4)}) > 1


async def test_logprobs(client: OpenAI) -> None:
    choice = client.chat.completions.create(**ONCE | {"max_tokens": 3}, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 3
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2


async def test_an_answer_in_json(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(**ONCE | {"max_tokens": 40}, response_format=wanted)
    answer = json.loads(reply.choices[0].message.content or "")
    assert answer["city"] in ("Paris", "Rome")
    assert isinstance(answer["capital"], bool)


async def test_tools_may_be_offered(client: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    wanted: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": [tool], "temperature": 0, "max_tokens": 8}
    message = client.chat.completions.create(**wanted).choices[0].message
    # Nothing of this model's chat template speaks of tools, so that it mostly just talks.
    assert message.content or message.tool_calls
    for call in message.tool_calls or []:
        assert call.type == "function"
        assert call.function.name == "get_weather"


# Others


async def test_completions(client: OpenAI) -> None:
    wanted: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
    reply = client.completions.create(**wanted)
    assert "Paris" in reply.choices[0].text
    chunks = list(client.completions.create(**wanted, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text


async def test_the_list_of_models(client: OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "fleetmind"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("smollm")
    assert caught.value.body["near"] == [MODEL]  # type: ignore[index]


async def test_vectors(real: Child, client: OpenAI, model_file: Path) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="hello")
    assert "embedding" in caught.value.message
    body = {"source": "file", "path": str(model_file), "name": "vectors", "context_tokens": 256, "slots": 1}
    added = await real.ask("POST", "/api/models", json=body | {"options": {"embedding": True, "pooling": "mean"}})
    assert added.status == 201, added.body
    await real.until_state("vectors", "ready")
    data = client.embeddings.create(model="vectors", input=["A cat sleeps.", "A cat sleeps.", "Taxes rose."]).data
    one, same, other = ([float(x) for x in entry.embedding] for entry in data)
    assert len(one) == 576
    assert _cosine(one, same) > 0.999
    assert _cosine(one, other) < 0.99
    floats = client.embeddings.create(model="vectors", input="A cat sleeps.", encoding_format="float").data[0].embedding
    assert _cosine(one, floats) > 0.999
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="vectors", messages=QUESTION)
    assert (await real.ask("DELETE", "/api/models/vectors")).status == 204


def _cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5


# Refusals


async def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="SmolLM2-135M", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message
    assert caught.value.body["near"] == [MODEL]  # type: ignore[index]


async def test_a_wrong_key(real: Child, client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="fm_wrong").models.list()
    assert caught.value.code == "invalid_api_key"


async def test_a_key_without_the_right(real: Child, client: OpenAI) -> None:
    made = await real.ask("POST", "/api/keys", json={"name": "reader", "scopes": ["read"]})
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=made.json()["key"]).models.list()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_prompt_over_the_context(client: OpenAI, is_stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": LONG}], stream=is_stream)
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT_TOKENS) in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=LONG, stream=is_stream)
    assert caught.value.code == "context_length_exceeded"


async def test_more_tokens_wanted_than_the_context_holds(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ONCE | {"max_tokens": CONTEXT_TOKENS + 1})
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"


async def test_a_wrong_value(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ONCE, extra_body={"n": 0})
    assert caught.value.param == "n"


async def test_what_it_used_is_recorded_as_real(real: Child, client: OpenAI) -> None:
    client.chat.completions.create(**ONCE | {"max_tokens": 1})

    async def look() -> bool:
        return bool((await real.ask("GET", "/api/usage")).json()["rows"])

    await until(look, "its usage is recorded")
    rows = (await real.ask("GET", "/api/usage")).json()["rows"]
    assert not any(row["is_simulated"] for row in rows)
