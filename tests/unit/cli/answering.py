"""A small HTTP server that gives prepared answers, and remembers what it was asked."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from fleetmind.cli.presence import Running

TOKEN = "fm_of_this_start"
Reply = tuple[int, object]
Script = Callable[[str, str, Any], Reply]
"""Method, path with its query, body; gives a status and a document, or bytes to be sent as they are."""


class Answering:
    """The server's side."""

    def __init__(self, script: Script) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.authorizations: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                document = json.loads(body) if body else None
                outer.asked.append((self.command, self.path, document))
                outer.authorizations.append(self.headers.get("Authorization"))
                status, reply = script(self.command, self.path, document)
                content = reply if isinstance(reply, bytes) else b"" if reply is None else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def running(self) -> Running:
        return Running(self.url, os.getpid(), psutil.Process().create_time(), TOKEN)

    def announce(self, home: Path) -> None:
        """Leave the file by which a command finds this server."""
        (home / "run").mkdir(parents=True, exist_ok=True)
        running = self.running
        document = {"url": running.url, "pid": running.pid, "started_at_s": running.started_at_s, "token": TOKEN}
        (home / "run" / "server.json").write_text(json.dumps(document))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def answering(script: Script) -> Iterator[Answering]:
    """A server that answers with ``script`` until the block ends."""
    server = Answering(script)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def stream_of(*events: object, is_whole: bool = True) -> bytes:
    """Events as a server sends them; ``is_whole`` adds the end mark."""
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return ("".join(lines) + ("data: [DONE]\n\n" if is_whole else "")).encode()


def part(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk of a chat answer."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def problem(code: str, message: str, **more: object) -> dict[str, object]:
    """A refusal as the server words it."""
    return {"error": {"message": message, "type": "x", "param": None, "code": code, "origin": "gateway", **more}}


def model(name: str, state: str = "ready", **more: object) -> dict[str, object]:
    """A catalogue entry."""
    return {
        "name": name, "source": "file", "engine": "llamacpp", "state": state, "reason": "", "context_tokens": 4096,
        "slots": 4, "replicas_wanted": 1, "replicas_ready": int(state == "ready"), "path": f"/weights/{name}.gguf",
        "url": None, "weights_bytes": 1000, "quantisation": "Q4_0", "abilities": ["chat", "completion"],
        "is_simulated": False, **more,
    }  # fmt: skip
