"""Bodies that no good client sends, at every route that reads one: each refused with what is wrong, none remembered."""

import asyncio
import gzip
import http.client
import io
import json
import os
import struct
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from tests.flow.child import running_apart
from tests.flow.service import Service, running
from tests.flow.wire import drip, error_of, say

from fleetmind.core.types import MIB
from fleetmind.testing import model_files

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = b'[{"role":"user","content":"x"}]'
DEEP = b"[" * 100_000 + b"]" * 100_000
CALLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """One service for all that is thrown at it, with a model named fake; at the end it must be well."""
    home = tmp_path_factory.mktemp("bad-input")
    async with running(home, server__body_read_s_max="0.7") as service:
        await service.add_fake("fake")
        yield service
        assert (await service.chat("fake")).status == 200
        assert "a request failed" not in (home / "logs" / "server.log").read_text(), "something answered with a 500"


async def refused(service: Service, path: str, body: bytes | dict[str, Any], status: int = 400) -> dict[str, Any]:
    """The error that answers ``body``."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await service.ask("POST", path, data=data, headers={"Content-Type": "application/json"})
    assert answer.status == status, answer.body[:500]
    error = error_of(answer)
    assert error["origin"] == "gateway"
    return error


def chat(fields: bytes = b"", messages: bytes = MESSAGES) -> bytes:
    return b'{"model":"fake",%s"messages":%s}' % (fields, messages)


# Calls to models


@pytest.mark.parametrize("path", [*CALLS, "/api/models", "/api/keys", "/api/fit"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b'{"model":"fake","source":"\xff"}',
        b'{"model":"\xc3\x28"}',
        b'{"model":"\\ud800","source":"\\ud800","name":"\\ud800","path":"\\ud800"}',
        b'{"\\udfff":1}',
        b"\xef\xbb\xbf{}",
        b"\x1f\x8b\x08\x00",
        '{"model":"fake"}'.encode("utf-16"),
        b"{" * 100_000,
        DEEP,
        b'{"model":"fake","x":%s}' % DEEP,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_what_is_not_a_json_object_of_text_is_refused(service: Service, path: str, body: bytes) -> None:
    await refused(service, path, body)


@pytest.mark.parametrize("path", ["/api/models", "/api/keys", "/api/fit"])
async def test_a_body_that_does_not_say_it_is_json_does_no_harm(service: Service, path: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = await service.ask("POST", path, data=b'{"path":"\\ud800"}', headers={"Content-Type": kind})
        assert answer.status == 400, answer.body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (b'"max_tokens":"5",', "max_tokens"),
        (b'"max_tokens":1.5,', "max_tokens"),
        (b'"max_tokens":true,', "max_tokens"),
        (b'"max_tokens":0,', "max_tokens"),
        (b'"max_tokens":-1,', "max_tokens"),
        (b'"max_completion_tokens":-1,', "max_tokens"),
        (b'"max_tokens":-%s,' % (b"9" * 400), "max_tokens"),
        (b'"stream":"yes",', "stream"),
        (b'"stream":1,', "stream"),
        (b'"stream_options":"all",', "stream_options"),
        (b'"n":0,', "n"),
        (b'"n":1000000,', "n"),
        (b'"temperature":"hot",', "temperature"),
        (b'"temperature":1e999,', "temperature"),
        (b'"top_p":[],', "top_p"),
        (b'"seed":"lucky",', "seed"),
        (b'"stop":{},', "stop"),
        (b'"tools":"all",', "tools"),
        (b'"user":7,', "user"),
        (b'"logprobs":true,"top_logprobs":1000000000,', "top_logprobs"),
        (b'"top_logprobs":-1,', "top_logprobs"),
        (b'"n_probs":1000000000,', "n_probs"),
    ],
    ids=lambda value: value.decode()[:30] if isinstance(value, bytes) else value,
)
async def test_a_value_of_the_wrong_type_or_size_is_named(service: Service, fields: bytes, param: str) -> None:
    assert (await refused(service, "/v1/chat/completions", chat(fields)))["param"] == param


async def test_a_completion_with_too_many_alternatives_is_refused(service: Service) -> None:
    body = {"model": "fake", "prompt": "x", "logprobs": 10**9}
    assert (await refused(service, "/v1/completions", body))["param"] == "logprobs"


@pytest.mark.parametrize("messages", [b'"hi"', b"{}", b"[]", b"[1]", b"[{}]", b"null", b'[{"role":1}]'])
async def test_messages_that_are_none_are_refused(service: Service, messages: bytes) -> None:
    error = await refused(service, "/v1/chat/completions", chat(messages=messages))
    assert error["param"].startswith("messages")


@pytest.mark.parametrize("number", [b"4097", b"9" * 18, b"9" * 40], ids=len)
async def test_more_tokens_than_the_context_holds_are_refused_with_its_size(service: Service, number: bytes) -> None:
    error = await refused(service, "/v1/chat/completions", chat(b'"max_tokens":%s,' % number))
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["hint"]


async def test_a_prompt_larger_than_the_context_is_refused(service: Service) -> None:
    answer = await service.chat("fake", "word " * 5000)
    assert answer.status == 400
    error = error_of(answer)
    assert (error["code"], error["origin"]) == ("context_length_exceeded", "engine")
    assert error["hint"]


async def test_an_unknown_model_is_refused_with_the_names_that_come_near(service: Service) -> None:
    error = await refused(service, "/v1/chat/completions", {"model": "Fake-", "messages": [{"role": "user"}]}, 404)
    assert (error["code"], error["param"], error["near"]) == ("model_not_found", "model", ["fake"])
    assert "fake" in error["message"], "a client that shows only the message shows the near name, too"
    for name in ("", "\0", "../../etc/passwd", "x" * 100_000, "{fake}", "fake\n"):
        body = {"model": name, "messages": [{"role": "user"}]}
        error = await refused(service, "/v1/chat/completions", body, 404)
        assert len(error["message"]) < 1000


async def test_more_messages_than_the_bound_are_refused(service: Service) -> None:
    many = b"[" + b",".join([b'{"role":"user","content":"x"}'] * 10_000) + b"]"
    error = await refused(service, "/v1/chat/completions", chat(messages=many), 413)
    assert "10000" in error["message"]
    assert "server.messages_max" in error["hint"]


@pytest.mark.parametrize("text", [{}, 7, None, [], [{}], [[1.5]], [None]], ids=str)
async def test_a_text_to_complete_or_embed_that_is_none_is_refused(service: Service, text: object) -> None:
    assert (await refused(service, "/v1/embeddings", {"model": "fake", "input": text}))["param"] == "input"
    if text is not None:
        assert (await refused(service, "/v1/completions", {"model": "fake", "prompt": text}))["param"] == "prompt"


@pytest.mark.parametrize("path", [*CALLS, "/api/models", "/api/keys"])
async def test_a_body_that_comes_too_slowly_is_refused_in_time(service: Service, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: {service.host}\r\nAuthorization: Bearer {service.token}\r\n"
    (answer,) = await say(service.url, drip(head + "Content-Length: 100000\r\n\r\n", b" "))
    assert answer.status == 408
    assert error_of(answer)["code"] == "body_timeout"


async def test_a_body_that_is_sent_on_after_the_refusal_ends_with_its_connection(service: Service) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {service.host}\r\nContent-Length: 100000\r\n\r\n"
    (answer,) = await say(service.url, drip(head, b" "))
    assert answer.status == 401


# A body too large


def _status_after_sending_all(url: str, token: str, pieces: Iterator[bytes] | io.BytesIO, length: int | None) -> int:
    """What a client sees that sends its whole body before it reads a byte, as most do."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    headers = {"Authorization": f"Bearer {token}"} | ({"Content-Length": str(length)} if length else {})
    connection.request("POST", "/v1/chat/completions", pieces, headers, encode_chunked=length is None)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
async def test_a_huge_body_is_refused_readably_and_held_by_nobody(tmp_path: Path) -> None:
    size = 100 * MIB
    async with running_apart(tmp_path / "home") as child:
        before = _peak_bytes(child.pid)
        for length in (size, None):
            pieces = iter([bytes(MIB)] * 100)
            status = await asyncio.to_thread(_status_after_sending_all, child.url, child.token, pieces, length)
            assert status == 413
        # Of a body whose size isn't said, what is allowed (32 MiB) is held for a moment.
        assert _peak_bytes(child.pid) - before < size / 2
        answer = await child.ask("POST", "/v1/chat/completions", data=bytes(40 * MIB))
        assert answer.status == 413
        assert "server.body_bytes_max" in error_of(answer)["hint"]
        answer = await child.ask("POST", "/api/keys", data=bytes(2 * MIB))
        assert answer.status == 413


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


async def test_a_size_that_is_too_large_is_refused_before_the_body_is_asked_for(service: Service) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {service.host}\r\nAuthorization: Bearer {service.token}\r\n"
    for length in ("999999999999", "9" * 19):
        answers = await say(service.url, f"{head}Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n")
        assert [answer.status for answer in answers] in ([413], [400])


# Management


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/models", {"source": "magic"}, "source"),
        ("/api/models", {"source": "fake"}, "name"),
        ("/api/models", {"source": "file"}, "path"),
        ("/api/models", {"source": "remote", "name": "x"}, "url"),
        ("/api/models", {"source": "fake", "name": "x", "slots": 0}, "slots"),
        ("/api/models", {"source": "fake", "name": "x", "slots": 10**9}, "slots"),
        ("/api/models", {"source": "fake", "name": "x", "slots": "4"}, "slots"),
        ("/api/models", {"source": "fake", "name": "x", "replicas": -1}, "replicas"),
        ("/api/models", {"source": "fake", "name": "x", "context_tokens": 10**30}, "context_tokens"),
        ("/api/models", {"source": "fake", "name": "x", "color": "red"}, "color"),
        ("/api/models", {"source": "fake", "name": "x", "options": {"load": 1}}, "options"),
        ("/api/models", {"source": "fake", "name": "x", "options": {"load_s": -1}}, "options"),
        ("/api/models", {"source": "remote", "name": "x", "url": "file:///etc/passwd"}, "url"),
        ("/api/models", {"source": "remote", "name": "x", "url": "http://user:secret@host/"}, "url"),
        ("/api/models", {"source": "remote", "name": "x", "url": "http://[::1"}, "url"),
        ("/api/models", {"source": "remote", "name": "x", "url": "http://h", "key_env": "A=B"}, "key_env"),
        ("/api/keys", {"name": ""}, "name"),
        ("/api/keys", {"name": "x" * 1000}, "name"),
        ("/api/keys", {"name": "a\x1b[31m"}, "name"),
        ("/api/keys", {"name": "x", "scopes": ["root"]}, "scopes.0"),
        ("/api/keys", {"name": "x", "scopes": []}, "scopes"),
        ("/api/keys", {"name": "x", "expires_in_s": 0}, "expires_in_s"),
        ("/api/keys", {"name": "x", "expires_in_s": float("nan")}, "expires_in_s"),
        ("/api/keys", {"name": "x", "expires_in_s": float("inf")}, "expires_in_s"),
        ("/api/fit", {"path": "x", "slots": 0}, "slots"),
    ],
    ids=str,
)
async def test_a_wish_that_cannot_be_fulfilled_is_refused_by_name(
    service: Service, path: str, body: dict[str, Any], param: str
) -> None:
    error = await refused(service, path, body)
    assert error["param"] == param
    assert "secret" not in json.dumps(error)


@pytest.mark.parametrize(
    "name", ["../../escape", "..", ".hidden", "a/b", "/etc/passwd", "a\0b", "a\nb", "-rf", "", "x" * 129, "nämé", "a b"]
)
async def test_a_name_that_could_be_a_path_or_more_is_no_name(service: Service, name: str) -> None:
    await refused(service, "/api/models", {"source": "fake", "name": name})
    gguf = {"source": "file", "path": "/nowhere.gguf", "name": name}
    await refused(service, "/api/models", gguf)
    assert {path.name for path in service.home.iterdir()} <= {
        "fleetmind.db",
        "fleetmind.db-shm",
        "fleetmind.db-wal",
        "logs",
        "models",
        "pepper",
        "run",
    }


@pytest.mark.parametrize(
    "query",
    [
        "/api/usage?since_s=nan",
        "/api/usage?since_s=inf",
        "/api/usage?since_s=-1",
        "/api/usage?since_s=x",
        "/api/journal?after=-1",
        "/api/journal?after=99999999999999999999999",
        "/api/journal?limit=0",
        "/api/journal?limit=1e9",
        "/api/logs?lines=999999999",
        "/api/replicas/x/log?lines=-5",
    ],
)
async def test_a_question_with_an_impossible_number_is_refused(service: Service, query: str) -> None:
    answer = await service.ask("GET", query)
    assert answer.status == 400
    assert error_of(answer)["param"] in ("since_s", "after", "limit", "lines")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/models/nothing"),
        ("DELETE", "/api/models/%ff%00"),
        ("DELETE", "/api/keys/nothing"),
        ("DELETE", "/api/keys/operator"),
        ("GET", "/api/replicas/nothing/log"),
        ("GET", "/api/replicas/.hidden/log"),
        ("GET", "/api/replicas/%2e%2e%2f%2e%2e%2fserver/log"),
        ("POST", "/api/replicas/nothing/restart"),
        ("GET", "/api/models/nothing/routes"),
        ("GET", "/static/%2e%2e%2fauth.py"),
        ("GET", "/static/page.js%00"),
    ],
)
async def test_what_is_not_there_is_not_found(service: Service, method: str, path: str) -> None:
    answer = await service.ask(method, path)
    assert answer.status == 404
    error_of(answer)


# Model files


def _hostile_files(folder: Path) -> dict[str, Path]:
    """Files that claim to be models, by what is wrong with them."""
    good = model_files.tiny_model()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.gguf", bytes(16 * MIB))
    contents = {
        "empty": b"",
        "text": b"hello, I am a model",
        "truncated": good[: len(good) // 2],
        "magic-only": b"GGUF",
        "no-weights": good[:-1000],
        "gzip-bomb": gzip.compress(bytes(16 * MIB)),
        "zip-bomb": zipped.getvalue(),
        "version": b"GGUF" + struct.pack("<IQQ", 99, 1, 1),
        "endless-tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1),
        "endless-metadata": b"GGUF" + struct.pack("<IQQ", 3, 1, 2**63),
        "endless-text": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
        "zeros": bytes(MIB),
    }
    for name, content in contents.items():
        (folder / f"{name}.gguf").write_bytes(content)
    paths = {name: folder / f"{name}.gguf" for name in contents}
    os.mkfifo(folder / "pipe.gguf")
    (folder / "loop.gguf").symlink_to(folder / "loop.gguf")
    (folder / "folder.gguf").mkdir()
    odd = {name: folder / f"{name}.gguf" for name in ("pipe", "loop", "folder", "missing")}
    return paths | odd | {"device": Path("/dev/zero"), "nul": Path("a\0b"), "long": Path("/x" * 5000)}


async def test_a_file_that_is_no_model_is_refused_with_its_fault(service: Service, tmp_path: Path) -> None:
    models = {model["name"] for model in (await service.ask("GET", "/api/models")).json()["models"]}
    for name, path in _hostile_files(tmp_path).items():
        for route, body in (("/api/models", {"source": "file", "path": str(path)}), ("/api/fit", {"path": str(path)})):
            error = await refused(service, route, body)
            fault, colon, _ = error["message"].partition(": ")
            assert error["code"] == "invalid_model_file", name
            assert colon, f"{name}: the message begins with the fault"
            assert fault.replace("-", "").isalpha(), f"{name}: {error['message']}"
    assert {model["name"] for model in (await service.ask("GET", "/api/models")).json()["models"]} == models
