"""How the streaming clients judge answers, and that they see what a server really sends."""

import asyncio
import json

import pytest
from bench.clients import Exchange, Plan, check, dechunked, finish, judged, request_bytes, run, start

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def events(tokens: int, *, usage: int | None = None) -> list[str]:
    words = [json.dumps({"choices": [{"delta": {"content": f"w{i} "}}]}) for i in range(tokens)]
    counted = json.dumps({"choices": [], "usage": {"completion_tokens": tokens if usage is None else usage}})
    return [f"data: {each}\n\n" for each in (*words, counted, "[DONE]")]


def chunked(parts: list[str]) -> list[bytes]:
    return [*(b"%x\r\n%s\r\n" % (len(part), part.encode()) for part in parts), b"0\r\n\r\n"]


def exchange(pieces: list[bytes], *, asked_at_s: float = 10.0, every_s: float = 0.5) -> Exchange:
    arrivals = [(asked_at_s + every_s * (i + 1), piece) for i, piece in enumerate(pieces)]
    return Exchange(asked_at_s, arrivals)


def plan(**changed: object) -> Plan:
    values: dict[str, object] = {
        "port": 1, "path": "/v1/chat/completions", "key": "k", "bodies": ('{"a": 1}',), "clients": 1, "requests": 1,
        "tokens": 3,
    }  # fmt: skip
    return Plan(**(values | changed))  # type: ignore[arg-type]


def test_a_whole_answer_is_right() -> None:
    assert check(exchange([HEAD, *chunked(events(3))]), 3) is None


def test_pieces_may_be_cut_anywhere() -> None:
    whole = HEAD + b"".join(chunked(events(3)))
    assert check(exchange([whole[i : i + 7] for i in range(0, len(whole), 7)]), 3) is None


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([HEAD.replace(b"200 OK", b"503 No"), *chunked(events(3))], "status 503"),
        ([HEAD, *chunked(events(3)[:-1])], "no [DONE]"),
        ([HEAD, *chunked(events(2))], "usage says 2"),
        ([HEAD, *chunked(events(3, usage=7))], "usage says 7"),
        ([HEAD, *chunked(['data: {"error": {}}\n\n', *events(3)])], "an error event"),
        ([HEAD, *chunked(["data: {]\n\n", *events(3)])], "an event is not"),
        ([HEAD, *chunked([events(3)[-2], "data: [DONE]\n\n"])], "no text"),
        ([], "no answer"),
    ],
)
def test_anything_else_is_wrong_for_a_reason(pieces: list[bytes], reason: str) -> None:
    assert reason in (check(exchange(pieces), 3) or "")


def test_a_body_cut_short_is_not_a_whole_answer() -> None:
    with pytest.raises(ValueError, match="cut short"):
        dechunked(b"5\r\nabc")


def test_times_are_between_pieces_and_to_the_first_event() -> None:
    seen = exchange([HEAD, *chunked(events(3))], every_s=0.25)
    assert seen.ttft_s() == 0.5
    assert set(seen.gaps_s()) == {0.25}


def test_wrong_answers_count_as_errors_and_not_as_tokens() -> None:
    right, wrong = exchange([HEAD, *chunked(events(3))]), exchange([HEAD])
    outcome = judged([right, wrong, right], plan(clients=4), duration_s=2.0, cpu_s=0.1)
    assert (outcome.answers, outcome.errors, outcome.tokens, outcome.tokens_per_s) == (2, 2, 6, 3.0)
    assert outcome.gap_max_s == 0.5


async def test_clients_see_a_real_server_stream_answer_after_answer() -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(await reader.readexactly(len('{"a": 1}')))
        for piece in [HEAD, *chunked(events(3))]:
            writer.write(piece)
            await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        asking = plan(port=server.sockets[0].getsockname()[1], clients=5, requests=2)
        outcome = await asyncio.to_thread(finish, await asyncio.to_thread(start, asking), within_s=30)
    assert (outcome.answers, outcome.errors, outcome.tokens) == (10, 0, 30)
    assert asked == [b'{"a": 1}'] * 10


async def test_a_server_that_hangs_up_is_an_error_for_every_answer_it_owed() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + chunked(events(3))[0])
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        outcome = await run(plan(port=server.sockets[0].getsockname()[1], clients=3, requests=2))
    assert (outcome.answers, outcome.errors) == (0, 6)


def test_the_request_carries_the_key_and_the_length() -> None:
    head, _, body = request_bytes(plan(), '{"ä": 1}').partition(b"\r\n\r\n")
    assert b"Authorization: Bearer k" in head
    assert f"Content-Length: {len(body)}".encode() in head
