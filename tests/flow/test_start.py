"""Starting: what must not be started is refused with what to do, and what is started is as safe as asked."""

import asyncio
import os
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import aiohttp
import psutil
import pytest
from tests.flow.child import running_apart
from tests.flow.service import running
from tests.flow.wire import error_of, say

from fleetmind.core.errors import ConfigurationError, Conflict, FleetmindError


async def refusal(home: Path, **flags: str) -> FleetmindError:
    """Why a service does not start."""
    with pytest.raises(FleetmindError) as caught:
        async with running(home, **flags):
            pass
    assert caught.value.hint, f"what to do about it: {caught.value.message}"
    assert not (home / "run" / "server.json").exists()
    return caught.value


async def test_a_port_in_use_is_a_conflict_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = await refusal(tmp_path, server__port=str(port))
    assert isinstance(error, Conflict)
    assert str(port) in error.message
    async with running(tmp_path, server__port=str(port)) as service:
        assert service.url.endswith(str(port))


async def test_a_second_server_on_a_home_is_a_conflict_and_harms_the_first_in_nothing(tmp_path: Path) -> None:
    async with running_apart(tmp_path) as first:
        found = (tmp_path / "run" / "server.json").read_text()
        with pytest.raises(Conflict) as caught:
            async with running(tmp_path):
                pass
        assert str(tmp_path) in caught.value.message
        assert caught.value.hint
        assert (tmp_path / "run" / "server.json").read_text() == found
        assert (await first.ask("GET", "/api/status")).status == 200


async def test_a_server_that_was_killed_leaves_a_home_that_starts_again(tmp_path: Path) -> None:
    async with running_apart(tmp_path) as first:
        await first.add_fake("fake")
        (replica,) = await first.replicas()
        os.kill(first.pid, signal.SIGKILL)
    async with running(tmp_path) as second:
        await second.until_state("fake", "ready")
        assert (await second.chat("fake")).status == 200
        assert not is_running(replica["pid"])
        doctor = (await second.ask("GET", "/api/doctor")).json()["checks"]
        assert [check for check in doctor if check["status"] == "fail"] == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_a_wide_address_without_tls_is_refused(tmp_path: Path, host: str) -> None:
    error = await refusal(tmp_path, server__host=host)
    assert isinstance(error, ConfigurationError)
    assert "server.tls_certificate" in error.hint


async def test_an_address_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    error = await refusal(
        tmp_path / "home",
        server__host="192.0.2.1",  # TEST-NET-1 of RFC 5737: nobody's
        server__tls_certificate=str(certificate),
        server__tls_key=str(key),
    )
    assert isinstance(error, ConfigurationError)


@pytest.mark.parametrize("broken", ["certificate", "key", "both", "swapped", "absent"])
async def test_tls_that_cannot_work_is_refused_before_anything_runs(tmp_path: Path, broken: str) -> None:
    certificate, key = make_certificate(tmp_path)
    if broken == "swapped":
        certificate, key = key, certificate
    elif broken == "absent":
        certificate = tmp_path / "none.pem"
    for path in {"certificate": [certificate], "key": [key], "both": [certificate, key]}.get(broken, []):
        path.write_text("-----BEGIN NONSENSE-----\n")
    error = await refusal(tmp_path / "home", server__tls_certificate=str(certificate), server__tls_key=str(key))
    assert isinstance(error, ConfigurationError)
    assert str(certificate) in error.message


async def test_with_tls_calls_are_encrypted_and_plain_ones_are_not_answered(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    flags = {"server__tls_certificate": str(certificate), "server__tls_key": str(key)}
    wide = {"server__host": "0.0.0.0", "server__hosts_allowed": "127.0.0.1"}
    async with running_apart(tmp_path / "home", **wide, **flags) as child:
        port = child.host.rpartition(":")[2]
        child.url = f"https://127.0.0.1:{port}"
        trusted = ssl.create_default_context(cafile=str(certificate))
        answer = await child.ask("GET", "/api/status", ssl=trusted)
        assert answer.status == 200
        assert answer.json()["url"] == f"https://0.0.0.0:{port}"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await child.ask("GET", "/health", key=None)  # nobody else vouches for it
        assert await say(f"http://127.0.0.1:{port}", "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") == []


async def test_a_service_that_is_told_to_end_ends_and_leaves_no_process(tmp_path: Path) -> None:
    async with running_apart(tmp_path) as child:
        await child.add_fake("fake", replicas=2)
        pids = [replica["pid"] for replica in await child.replicas()]
        assert len(pids) == 2
    assert not any(map(is_running, [child.pid, *pids]))
    assert not (tmp_path / "run" / "server.json").exists()
    assert not (tmp_path / "run" / "token").exists()


async def test_calls_that_do_not_end_before_the_server_does_are_told(tmp_path: Path) -> None:
    async with running(tmp_path, server__stop_s_max="0.3") as service:
        await service.add_fake("endless", tokens_per_s=20, reply_tokens=4000)
        await service.add_fake("mute", ttft_s=3600)
        idle = await asyncio.open_connection(*service.host.split(":"))
        calls = asyncio.gather(service.listen("endless"), service.chat("mute"))
        await service.until_calls(outstanding=2)
        assert (await service.ask("POST", "/api/stop")).status == 202
        heard, answer = await calls
        assert not heard.is_whole
        assert "stopping" in heard.chunks[-1]["error"]["message"]
        assert answer.status == 503
        assert "stopping" in error_of(answer)["message"]
        assert await idle[0].read() == b""
    assert "Traceback" not in (tmp_path / "logs" / "server.log").read_text()


def is_running(pid: int) -> bool:
    """Whether the process lives. One that nobody waited for keeps its number and is dead all the same."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=fleetmind test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
