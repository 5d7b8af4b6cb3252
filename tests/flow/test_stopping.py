"""How a service ends, and what it needs to begin."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from tests.flow.service import running

from fleetmind.app import serve
from fleetmind.core.config import load
from fleetmind.core.errors import ConfigurationError

STREAM = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}


async def test_a_stream_under_way_ends_before_the_service_does(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake(reply_tokens=10, tokens_per_s=20)
        headers = {"Authorization": f"Bearer {service.token}"}
        async with service.session.post(f"{service.url}/v1/chat/completions", json=STREAM, headers=headers) as response:
            await response.content.readany()
            assert (await service.ask("POST", "/api/stop")).status == 202
            rest = await response.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_stream_that_takes_too_long_is_told_that_the_service_stops(tmp_path: Path) -> None:
    async with running(tmp_path, server__stop_s_max="1") as service:
        await service.add_fake(reply_tokens=1000, tokens_per_s=5)
        headers = {"Authorization": f"Bearer {service.token}"}
        async with service.session.post(f"{service.url}/v1/chat/completions", json=STREAM, headers=headers) as response:
            await response.content.readany()
            assert (await service.ask("POST", "/api/stop")).status == 202
            rest = await response.content.read()
    last = rest.rstrip().rpartition(b"data: ")[2]
    assert "stopping" in json.loads(last)["error"]["message"]
    assert b"[DONE]" not in rest


async def test_a_home_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    home = tmp_path / "a-file" / "home"
    configuration = load(tmp_path, environ={}, flags={"server.port": "0"})
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        with pytest.raises(ConfigurationError, match="can't be used to keep state") as refused:
            await serve(home, configuration, on_ready=lambda _: None)
    finally:
        os.umask(umask)
    assert "--home" in refused.value.hint


async def test_keys_made_with_a_pepper_that_is_gone_are_spoken_of(tmp_path: Path) -> None:
    async with running(tmp_path):
        pass
    (tmp_path / "pepper").unlink()
    async with running(tmp_path) as service:
        assert any("pepper was missing" in note for note in service.started.notes)


async def test_a_remote_model_that_points_back_here_ends_in_a_refusal(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        body = {"source": "remote", "name": "loop", "url": f"{service.url}/v1", "key_env": "LOOP_KEY"}
        os.environ["LOOP_KEY"] = service.token
        try:
            assert (await service.ask("POST", "/api/models", json=body)).status == 201
            await service.until_state("loop", "ready")
            async with asyncio.timeout(20):
                answer = await service.chat("loop")
        finally:
            del os.environ["LOOP_KEY"]
        assert answer.status == 400
        assert "passed through 4 Fleetmind servers" in answer.error["message"]


async def test_an_allowed_page_may_ask_and_read_and_no_other(tmp_path: Path) -> None:
    page = "https://lab.example.org"
    async with running(tmp_path, server__origins_allowed=page) as service:
        asked = await service.ask("OPTIONS", "/v1/models", key=None, headers={"Origin": page})
        assert asked.status == 204
        assert "authorization" in asked.headers["access-control-allow-headers"]
        for path, key in (("/v1/models", ""), ("/api/status", ""), ("/v1/models", None)):
            answer = await service.ask("GET", path, key=key, headers={"Origin": page})
            assert answer.headers["access-control-allow-origin"] == page
            assert answer.status == (200 if key == "" else 401)
        other = await service.ask("OPTIONS", "/v1/models", key=None, headers={"Origin": "https://evil.example.org"})
        assert other.status == 403
        assert "access-control-allow-origin" not in other.headers
