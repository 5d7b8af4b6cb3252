"""Speaks HTTP to a running server, with nothing but the standard library.

One connection per question: a command asks a few. Whatever goes wrong leaves as Unreachable or as the server's own
words in a ServerRefused; nothing is tried again here.
"""

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from fleetmind.cli.exits import ServerRefused, Unreachable
from fleetmind.cli.presence import Running

ANSWER_S_MAX = 60.0
STREAM_IDLE_S_MAX = 300.0
"""How long a stream may be silent: a large model may take minutes before its first token."""
LINE_BYTES_MAX = 4 * 1024**2
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 409: "conflict"}


class Client:
    """The command line's side of one server."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self._address = urlsplit(server.url)

    def get(self, path: str, **query: object) -> Any:
        """What ``path`` shows. Raises Unreachable, ServerRefused."""
        asked = urlencode({name: value for name, value in query.items() if value is not None})
        return self._ask("GET", f"{path}?{asked}" if asked else path)

    def post(self, path: str, body: Mapping[str, object] | None = None) -> Any:
        """What comes of sending ``body``. Raises Unreachable, ServerRefused."""
        return self._ask("POST", path, body or {})

    def delete(self, path: str, name: str) -> None:
        """Remove ``name`` below ``path``. Raises Unreachable, ServerRefused."""
        self._ask("DELETE", f"{path}/{quote(name, safe='')}")

    @contextmanager
    def stream(self, path: str, body: Mapping[str, object]) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a streamed answer, each as soon as it is there. Leaving early closes the connection, which
        ends the call at the server. Raises Unreachable, ServerRefused (also for an error in the stream)."""
        connection = self._connect(STREAM_IDLE_S_MAX)
        try:
            with self._translated():
                response = self._send(connection, "POST", path, body)
            yield self._events(response)  # translates for itself: what the reader does wrong is not the server's fault
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        connection = self._connect(ANSWER_S_MAX)
        try:
            with self._translated():
                text = self._send(connection, method, path, body).read()
                return json.loads(text) if text else None
        finally:
            connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, object] | None
    ) -> http.client.HTTPResponse:
        headers = {"Authorization": f"Bearer {self.server.token}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise refusal(response.status, response.read(LINE_BYTES_MAX))
        return response

    def _connect(self, seconds_max: float) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        if self._address.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=seconds_max, context=self._tls())
        return http.client.HTTPConnection(host, port, timeout=seconds_max)

    def _tls(self) -> ssl.SSLContext:
        """Trust exactly the certificate this home's server was given, whatever name is in it; else the system's."""
        context = ssl.create_default_context()
        if self.server.certificate:
            context.check_hostname = False
            context.load_verify_locations(self.server.certificate)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise Unreachable(
                f"The server at {self.server.url} (process {self.server.pid}) does not answer in time.",
                hint="See what it is doing: fleetmind logs",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(
                f"The server at {self.server.url} (process {self.server.pid}) broke off: {error}.",
                hint="See why: fleetmind logs. It may be stopping: fleetmind status",
            ) from error

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        while True:
            with self._translated():
                line = response.readline(LINE_BYTES_MAX)
                if not line:
                    raise http.client.HTTPException("the answer ended before its end mark")
                text = line[len(b"data:") :].strip() if line.startswith(b"data:") else b""
                event = json.loads(text) if text and text != b"[DONE]" else None
            if text == b"[DONE]":
                return
            if event is not None:
                if isinstance(event.get("error"), dict):
                    raise refusal(HTTPStatus.BAD_GATEWAY, text)
                yield event


def refusal(status: int, body: bytes) -> ServerRefused:
    """The server's error as an exception, however little of it can be read."""
    try:
        problem = json.loads(body)["error"]
        message, hint = str(problem["message"]), str(problem.get("hint") or "")
        retry_after_s = problem.get("retry_after_s")
        return ServerRefused(
            message.removesuffix(hint).rstrip(),
            code=str(problem.get("code") or _CODES.get(status, "error")),
            hint=hint,
            param=problem.get("param"),
            near=tuple(str(name) for name in problem.get("near") or ()),
            origin=str(problem.get("origin") or "gateway"),
            retry_after_s=float(retry_after_s) if retry_after_s is not None else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        said = body[:200].decode(errors="replace").strip()
        return ServerRefused(f"The server answered {status}: {said}", code=_CODES.get(status, "error"))
