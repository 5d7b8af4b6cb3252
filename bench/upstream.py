"""The fixed upstream: nginx answering one chat completion, whole or as server-sent events, always the same.

It costs next to nothing, so what a proxy in front of it adds is the proxy's own. nginx can't look into a body;
``/v1`` answers with JSON and ``/stream/v1`` with events, and each peer gets both as two models.
"""

import json
import shutil
from pathlib import Path

from bench.processes import NotMeasured, Running, answers, free_port

WHOLE, STREAM = "fixed", "fixed-stream"
WORDS = (
    "The", " harbour", " lay", " still", " under", " a", " pale", " sky", " while", " the", " pilot", " boats",
    " waited", " for", " the", " morning", " tide", " to", " turn", " seaward.",
)  # fmt: skip
SENTENCE = "".join(WORDS)
USAGE = {"prompt_tokens": 24, "completion_tokens": len(WORDS), "total_tokens": 24 + len(WORDS)}
WHOLE_TEXTS = (SENTENCE,)
STREAM_TEXTS = ("data: ", WORDS[1], WORDS[-1], '"total_tokens":', "data: [DONE]")
"""What each answer must hold. The texts survive a proxy that writes the JSON anew, as long as it keeps the content."""

_QUESTION = "Describe the harbour in the early morning, before the boats leave, in one sentence."
_COMMON = {"id": "chatcmpl-fixed", "created": 1700000000, "model": WHOLE}


def question(model: str, *, stream: bool) -> bytes:
    """The body that the load generator sends. Usage is asked for, as clients do that are billed."""
    body: dict[str, object] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": _QUESTION},
        ],
        "max_tokens": 64,
        "temperature": 0,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


def whole_answer() -> str:
    """The chat completion, in one piece."""
    message = {"role": "assistant", "content": SENTENCE}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return _compact({**_COMMON, "object": "chat.completion", "choices": [choice], "usage": USAGE})


def streamed_answer() -> tuple[str, ...]:
    """The same as events: a role, twenty words, an end, usage, and the terminator."""
    chunk = {**_COMMON, "object": "chat.completion.chunk"}

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {_compact({**chunk, 'choices': [choice]})}\n\n"

    usage = f"data: {_compact({**chunk, 'choices': [], 'usage': USAGE})}\n\n"
    words = (event({"content": word}) for word in WORDS)
    return (event({"role": "assistant", "content": ""}), *words, event({}, "stop"), usage, "data: [DONE]\n\n")


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def configuration(port: int, folder: Path) -> str:
    """nginx's configuration. Everything it writes stays in ``folder``."""
    events = streamed_answer()
    # nginx takes no word of a directive over 4 KiB, so the events come as variables that it puts together.
    sets = "\n".join(f"      set $event{i} '{event}';" for i, event in enumerate(events))
    stream = "".join(f"${{event{i}}}" for i in range(len(events)))
    models = _compact({"object": "list", "data": [{"id": name, "object": "model"} for name in (WHOLE, STREAM)]})
    temporary = "\n".join(
        f"  {kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
worker_processes 2;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 3600;
  tcp_nodelay on;
{temporary}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location ~ ^(/stream)?/v1/models$ {{ default_type application/json; return 200 '{models}'; }}
    location = /v1/chat/completions {{ default_type application/json; return 200 '{whole_answer()}'; }}
    location = /stream/v1/chat/completions {{
      default_type text/event-stream;
      # Clears the length that nginx knows, so that the events come chunked as a real engine's do.
      sub_filter_types text/event-stream;
      sub_filter 'never in these events' '';
{sets}
      return 200 '{stream}';
    }}
  }}
}}
"""


def start(folder: Path) -> tuple[Running, int]:
    """Start it on a free port. Raises NotMeasured."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise NotMeasured("nginx is not installed (Debian: apt-get install nginx-light)")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(configuration(port, folder))
    running = Running("nginx", (program, "-p", folder, "-c", file), log=folder / "nginx.log", cwd=folder)
    try:
        running.wait_until(answers(port, "/v1/models"), within_s=10)
    except BaseException:
        running.stop()
        raise
    return running, port
