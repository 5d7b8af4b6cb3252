"""Bytes on a socket: what no proper client sends, and what comes back."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from tests.flow.service import Answer

HEARD_S_MAX = 30.0


async def say(url: str, *pieces: bytes | str | AsyncIterable[bytes]) -> list[Answer]:
    """Send ``pieces`` to the server at ``url`` and return all its answers once it has closed the connection.

    That it closes within HEARD_S_MAX is a part of every test that uses this.
    """
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    sending = asyncio.ensure_future(_send(writer, pieces))
    try:
        async with asyncio.timeout(HEARD_S_MAX):
            return [answer async for answer in _answers(reader)]
    finally:
        sending.cancel()
        writer.close()


def get(host: str, path: str, *headers: str, method: str = "GET") -> str:
    """A request without a body, the last one on its connection."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return "".join(f"{line}\r\n" for line in lines) + "\r\n"


async def drip(start: str, piece: bytes) -> AsyncIterator[bytes]:
    """``start``, then ``piece`` again and again, each well within any time limit: the slow client itself."""
    yield start.encode()
    while True:
        await asyncio.sleep(0.05)
        yield piece


async def _send(writer: asyncio.StreamWriter, pieces: tuple[bytes | str | AsyncIterable[bytes], ...]) -> None:
    try:
        for piece in pieces:
            if isinstance(piece, bytes | str):
                writer.write(piece if isinstance(piece, bytes) else piece.encode("latin-1"))
                await writer.drain()
                continue
            async for part in piece:
                writer.write(part)
                await writer.drain()
    except ConnectionError:
        pass  # the server has had enough, which is what many a test wants


async def _answers(reader: asyncio.StreamReader) -> AsyncIterator[Answer]:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise AssertionError(f"half an answer: {end.partial!r}") from None
            return
        except ConnectionResetError:
            return
        yield Answer(int(first.split(" ")[1]), headers, body)


def error_of(answer: Answer) -> dict[str, Any]:
    """The error in an answer, checked to have the shape that every error has."""
    assert answer.headers["content-type"].startswith("application/json")
    error = json.loads(answer.body)["error"]
    assert {"message", "type", "param", "code", "origin"} <= error.keys()
    assert error["message"]
    return error
