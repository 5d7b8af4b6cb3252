"""Requests below the level of JSON: bytes that are no HTTP, requests of other sites, clients that send badly."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.flow.service import Service, running, until
from tests.flow.wire import drip, error_of, get, say

pytestmark = pytest.mark.asyncio(loop_scope="module")

KIB = 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """One service for all that is thrown at it; at the end it must be well, and its log short."""
    home = tmp_path_factory.mktemp("bad-http")
    async with running(
        home,
        server__body_read_s_max="0.7",
        server__stall_s_max="0.7",
        server__hosts_allowed="fleet.example",
        server__origins_allowed="https://lab.example",
    ) as service:
        await service.add_fake("fake")
        yield service
        assert (await service.chat("fake")).status == 200
        log = (home / "logs" / "server.log").read_text()
        assert "a request failed" not in log, "something answered with a 500"
        assert len(log) < 10_000, "strangers can fill the log"


def post(service: Service, *headers: str, key: bool = True, path: str = "/v1/chat/completions") -> str:
    """The head of a request with a body."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {service.host}", *headers]
    if key:
        lines.append(f"Authorization: Bearer {service.token}")
    return "".join(f"{line}\r\n" for line in lines) + "\r\n"


# No HTTP


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, to a port that has none
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"G\xcbT / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    ],
    ids=lambda garbage: repr(garbage[:20]),
)
async def test_what_is_not_http_is_told_so_and_hung_up_on(service: Service, garbage: bytes) -> None:
    (answer,) = await say(service.url, garbage)
    assert answer.status == 400
    assert error_of(answer)["type"] == "invalid_request_error"
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked, identity",),
        ("Content-Length: -5",),
        ("Content-Length: 5, 5",),
        ("Content-Length: 99999999999999999999999999",),
        ("X: a\0b",),
        ("X: a\r\n b",),
        ("X : a",),
        (": a",),
    ],
    ids=str,
)
async def test_a_request_that_two_servers_would_read_differently_is_refused(
    service: Service, headers: tuple[str, ...]
) -> None:
    (answer,) = await say(service.url, post(service, *headers), b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
    assert answer.status == 400


async def test_a_broken_chunk_ends_the_request(service: Service) -> None:
    (answer,) = await say(service.url, post(service, "Transfer-Encoding: chunked"), b"2\r\n{}\r\nzz\r\nfoo\r\n")
    assert answer.status == 400


async def test_what_stands_behind_a_body_is_no_header(service: Service) -> None:
    head = post(service, "Transfer-Encoding: chunked", "Connection: close", key=False)
    trailer = f"Authorization: Bearer {service.token}\r\nHost: evil.example\r\n\r\n"
    (answer,) = await say(service.url, f"{head}2\r\n{{}}\r\n0\r\n{trailer}")
    assert answer.status == 401


# Too much, too slow


@pytest.mark.parametrize("line", [b"X-%d: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["many", "endless"])
async def test_a_flood_of_headers_is_stopped(service: Service, line: bytes) -> None:
    flood = b"".join(line % n if b"%d" in line else line for n in range(4000))
    (answer,) = await say(service.url, f"GET /health HTTP/1.1\r\nHost: {service.host}\r\nX: ", flood)
    assert answer.status == 431
    assert error_of(answer)["code"] == "payload_too_large"


async def test_an_endless_address_is_stopped(service: Service) -> None:
    (answer,) = await say(service.url, b"GET /" + b"y" * 4_000_000)
    assert answer.status == 431


async def test_a_flood_behind_a_body_is_stopped(service: Service) -> None:
    head = post(service, "Transfer-Encoding: chunked") + "2\r\n{}\r\n0\r\n"
    (answer,) = await say(service.url, head, b"".join(b"X-%d: %s\r\n" % (n, b"y" * 1000) for n in range(4000)))
    assert answer.status == 431


@pytest.mark.parametrize("start", ["GET /hea", "GET /health HTTP/1.1\r\nHost: localhost\r\nX: "], ids=["line", "head"])
async def test_a_head_that_comes_too_slowly_is_refused_in_time(service: Service, start: str) -> None:
    (answer,) = await say(service.url, drip(start, b"y"))
    assert answer.status == 408
    assert error_of(answer)["code"] == "body_timeout"


@pytest.mark.parametrize("start", ["", "\r\n\r\n"], ids=["silent", "blank"])
async def test_a_client_that_asks_nothing_is_hung_up_on(service: Service, start: str) -> None:
    assert await say(service.url, start) == []


async def test_a_thousand_idle_connections_keep_nobody_out(service: Service) -> None:
    streams = await asyncio.gather(*(asyncio.open_connection(*service.host.split(":")) for _ in range(1000)))
    assert (await service.ask("GET", "/health")).status == 200
    for _, writer in streams:
        writer.close()


async def test_past_the_bound_of_connections_a_client_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with running(tmp_path, server__connections_max="5") as small:
        streams = [await asyncio.open_connection(*small.host.split(":")) for _ in range(6)]
        (answer,) = await say(small.url, get(small.host, "/health"))
        assert answer.status == 503
        error = error_of(answer)
        assert error["code"] == "no_capacity"
        assert error["retry_after_s"] == int(answer.headers["retry-after"]) == 1
        for _, writer in streams:
            writer.close()

        async def look() -> bool:
            return (await small.ask("GET", "/health")).status == 200

        await until(look, "there is room again")


async def test_a_client_that_reads_nothing_does_not_keep_its_slot(service: Service) -> None:
    await service.add_fake("chatter", slots=1, reply_tokens=200_000, context_tokens=1_000_000)
    body = json.dumps({"model": "chatter", "stream": True, "messages": [{"role": "user", "content": "x"}]})
    host, _, port = service.host.partition(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        client.connect((host, int(port)))
        client.sendall((post(service, f"Content-Length: {len(body)}") + body).encode())

        async def is_busy() -> bool:
            return (await service.replicas("chatter"))[0]["outstanding"] == 1

        async def is_free() -> bool:
            return (await service.replicas("chatter"))[0]["outstanding"] == 0

        await until(is_busy, "the call is answered")
        await until(is_free, "the call is given up")
    assert (await service.ask("DELETE", "/api/models/chatter")).status == 204


# Several requests at once


async def test_requests_sent_ahead_are_answered_in_order(service: Service) -> None:
    paths = ["/health", "/api/status", "/nothing", "/health"] * 25
    first = "".join(get(service.host, path).replace("Connection: close\r\n", "") for path in paths)
    answers = await say(service.url, first + get(service.host, "/health"))
    assert [answer.status for answer in answers] == [200, 401, 401, 200] * 25 + [200]


async def test_a_client_that_sent_requests_ahead_and_left_frees_its_slot(service: Service) -> None:
    await service.add_fake("slow", slots=1, ttft_s=3600)
    body = json.dumps({"model": "slow", "messages": [{"role": "user", "content": "x"}]})
    request = post(service, f"Content-Length: {len(body)}") + body
    _, writer = await asyncio.open_connection(*service.host.split(":"))
    writer.write((request * 3).encode())

    async def outstanding() -> int:
        return (await service.replicas("slow"))[0]["outstanding"]

    async def is_busy() -> bool:
        return await outstanding() == 1

    async def is_free() -> bool:
        return await outstanding() == 0

    await until(is_busy, "the first is being answered")
    writer.close()
    await until(is_free, "the slot is free, and no later one took it")
    assert (await service.ask("DELETE", "/api/models/slow")).status == 204


async def test_a_wish_for_another_protocol_is_answered_in_http(service: Service) -> None:
    key = f"Authorization: Bearer {service.token}"
    for upgrade in ("websocket", "h2c"):
        wish = ("Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
        head = get(service.host, "/v1/models", *wish).replace("Connection: close\r\n", "")
        (answer,) = await say(service.url, head, b"\x81\x05hello" * 100)
        assert answer.status == 401
        (answer,) = await say(service.url, get(service.host, "/v1/models", key, *wish))
        assert answer.status == 200
        assert answer.headers["connection"] == "close", "nothing more is read from it, so nothing more may be sent"


# Other sites


async def statuses(service: Service, *headers: str, host: str | None = None, path: str = "/health") -> set[int]:
    """Statuses of the methods a page can use, with a valid key, so that only the site is in question."""
    key = f"Authorization: Bearer {service.token}"
    found = set()
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        request = get(host or service.host, path, *headers, key, "Content-Length: 0", method=method)
        if method != "HEAD":
            (answer,) = await say(service.url, request)
            assert not [name for name in answer.headers if name.startswith("access-control-")]
            found.add(answer.status)
    return found


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.", "0.0.0.0:{port}", "", "["]
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/api/status", "/nothing"])
async def test_a_server_called_by_another_name_does_not_answer(service: Service, host: str, path: str) -> None:
    port = service.host.partition(":")[2]
    assert await statuses(service, host=host.format(port=port) or " ", path=path) == {403}


@pytest.mark.parametrize(
    "lines",
    [
        "GET /health HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n",
        "GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: {host}\r\n",
        "GET /health HTTP/1.1\r\n",
        "GET http://evil.example/health HTTP/1.1\r\nHost: {host}\r\n",
        "GET http://{host}@evil.example/health HTTP/1.1\r\nHost: {host}\r\n",
        "GET http://{host}/health HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n",
    ],
)
async def test_a_host_in_doubt_is_refused(service: Service, lines: str) -> None:
    (answer,) = await say(service.url, lines.format(host=service.host) + "Connection: close\r\n\r\n")
    assert answer.status in (400, 403)


async def test_our_own_names_are_answered(service: Service) -> None:
    port = service.host.partition(":")[2]
    for host in (service.host, "localhost", "LOCALHOST:1", f"[::1]:{port}", "fleet.example", f"fleet.example:{port}"):
        (answer,) = await say(service.url, get(host, "/health"))
        assert answer.status == 200, host
    (answer,) = await say(service.url, get("evil.example", f"http://{service.host}/health"))
    assert answer.status == 200, "a whole address counts more than the header"


@pytest.mark.parametrize(
    "headers",
    [
        ("Origin: https://evil.example",),
        ("Origin: http://evil.example:{port}",),
        ("Origin: http://localhost:3000",),
        ("Origin: null",),
        ("Origin: ",),
        ("Origin: http://[",),
        ("Origin: file://",),
        ("Origin: https://lab.example.evil.example",),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: cross-site", "Origin: https://evil.example"),
    ],
    ids=str,
)
async def test_a_page_of_another_site_gets_nothing(service: Service, headers: tuple[str, ...]) -> None:
    port = service.host.partition(":")[2]
    lines = [line.format(port=port) for line in headers]
    for path in ("/", "/health", "/v1/models", "/v1/chat/completions", "/api/status", "/api/keys", "/nothing"):
        assert await statuses(service, *lines, path=path) == {403}


async def test_our_own_page_and_the_ones_allowed_may_ask(service: Service) -> None:
    for headers in (
        (f"Origin: http://{service.host}",),
        ("Origin: https://lab.example",),
        ("Origin: https://lab.example", "Sec-Fetch-Site: cross-site"),
        ("Sec-Fetch-Site: same-origin",),
        ("Sec-Fetch-Site: none",),
    ):
        (answer,) = await say(service.url, get(service.host, "/health", *headers))
        assert answer.status == 200, headers


async def test_a_page_frames_nothing_and_loads_nothing_foreign(service: Service) -> None:
    answer: Any = await service.ask("GET", "/", key=None)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
