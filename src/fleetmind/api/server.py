"""The HTTP server: from a socket to the gate.

Binds the address, refuses to be reachable from other machines without TLS, and hands every request to the gate. Knows
nothing of models.
"""

import asyncio
import contextlib
import errno
import ipaddress
import math
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fleetmind.api import manage, openai
from fleetmind.api.connection import SWEEP_S, Bounds, ConnectionConfig, sweep
from fleetmind.api.gate import Gate
from fleetmind.core.config import Configuration
from fleetmind.core.errors import ConfigurationError, Conflict
from fleetmind.core.settings import ServerSettings

BACKLOG = 2048
# A client may keep its connection this long between two calls.
KEEP_ALIVE_S = 75

FILES_PER_CONNECTION = 2
"""A call holds the client's connection and one to an engine."""
FILES_BESIDE = 512
"""Open files for everything else: the database, logs, replicas."""

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Http(uvicorn.Server):
    """uvicorn, leaving signals to the application, which stops its parts in order, and bounding its clients."""

    _swept_s = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._swept_s >= SWEEP_S:
            self._swept_s = now_s
            sweep(self.server_state.connections, now_s)
        return await super().on_tick(counter)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(settings: ServerSettings) -> None:
    """Raise ConfigurationError for an address beyond loopback without TLS, or for TLS that can't work."""
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise ConfigurationError(
            "server.tls_certificate and server.tls_key belong together.", hint="Set both, or neither."
        )
    for name, path in (("server.tls_certificate", settings.tls_certificate), ("server.tls_key", settings.tls_key)):
        if path and not Path(path).is_file():
            raise ConfigurationError(
                f"{name} names {path}, which is not a file.", hint="Check the path, and that this user may read it."
            )
    if settings.tls_certificate:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError(
                f"TLS can't be served with {settings.tls_certificate} and {settings.tls_key}: {error}.",
                hint="Both must be PEM files, and the key that of the certificate.",
            ) from None
    if not is_loopback(settings.host) and not settings.tls_certificate:
        raise ConfigurationError(
            f"server.host {settings.host} is reachable from other machines; without TLS keys would travel in clear.",
            hint="Set server.tls_certificate and server.tls_key, or keep server.host at 127.0.0.1.",
        )


def bind(settings: ServerSettings) -> socket.socket:
    """A socket that listens at the configured address. Raises Conflict for a port in use, ConfigurationError for an
    address that isn't ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only of a socket that says it is TCP does asyncio send small pieces at once; else each answer waits for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"Port {settings.port} of {settings.host} is in use by another program.",
                hint="Stop it, or choose another: fleetmind up --port PORT",
            ) from None
        raise ConfigurationError(
            f"Can't listen on {settings.host}:{settings.port}: {error.strerror or error}.",
            hint="Check server.host and server.port.",
        ) from None
    return listener


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """The address under which the server answers, with the port it really got."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_certificate else 'http'}://{host}:{listener.getsockname()[1]}"


def application(parts: manage.Parts) -> ASGIApp:
    """The whole ASGI application: gate, calls to models, management."""
    settings = parts.configuration.settings.server
    direct = openai.routes(parts.gateway, parts.inventory.snapshot, settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return Gate(
        manage.build(parts, direct),
        direct,
        keys=parts.keys,
        metrics=parts.metrics,
        hosts={*_LOOPBACK_NAMES, host, *settings.hosts_allowed},
        origins=settings.origins_allowed,
    )


def http_server(app: ASGIApp, configuration: Configuration) -> Http:
    """The server for ``app``; run it with ``serve(sockets=[…])``, end it by setting ``should_exit``."""
    settings = configuration.settings.server
    _allow_files(settings.connections_max * FILES_PER_CONNECTION + FILES_BESIDE)
    return Http(
        ConnectionConfig(
            app,
            Bounds(
                arrive_s_max=settings.body_read_s_max,
                stall_s_max=settings.stall_s_max,
                connections_max=settings.connections_max,
            ),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.stop_s_max),
            ssl_certfile=settings.tls_certificate or None,
            ssl_keyfile=settings.tls_key or None,
        )
    )


def _allow_files(count: int) -> None:
    """Let this process open ``count`` files, or as many as it may: the usual soft limit of 1024 is soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
