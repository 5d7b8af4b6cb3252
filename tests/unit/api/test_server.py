import asyncio
import socket

import pytest

from fleetmind.api.server import bind, check_exposure, is_loopback, url_of
from fleetmind.core.errors import ConfigurationError, Conflict
from fleetmind.core.settings import ServerSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    check_exposure(ServerSettings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.evil.org"])
def test_a_wider_address_needs_tls(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigurationError, match="TLS"):
        check_exposure(ServerSettings(host=host))


def test_half_a_certificate_is_refused(tmp_path) -> None:
    certificate = tmp_path / "c.pem"
    certificate.touch()
    for settings in (
        ServerSettings(tls_certificate=str(certificate)),
        ServerSettings(tls_key=str(certificate)),
        ServerSettings(tls_certificate=str(certificate), tls_key=str(tmp_path / "absent")),
    ):
        with pytest.raises(ConfigurationError):
            check_exposure(settings)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=str(port)):
            bind(ServerSettings(port=port))


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Can't listen"):
        bind(ServerSettings(host="192.0.2.1"))


def test_the_url_has_the_port_it_really_got() -> None:
    with bind(ServerSettings(port=0)) as listener:
        assert url_of(ServerSettings(port=0), listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_small_pieces_are_sent_at_once() -> None:
    accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(bool(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        writer.close()

    listener = bind(ServerSettings(port=0))
    async with await asyncio.start_server(greet, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await accepted
        writer.close()
