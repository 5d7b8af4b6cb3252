"""The fake engine: a real small program that speaks llama.cpp's HTTP surface and invents its answers.

For tests, benchmarks, the simulator and demos. Run with ``python -m``; reads one JSON object on stdin: ``host``,
``port``, ``api_key``, ``model`` and ``knobs`` (see :class:`fleetmind.node.engines.fake_knobs.Knobs` for what each
does; an unknown one is refused). It serves /health, /props, /v1/models, /v1/chat/completions, /v1/completions and
/v1/embeddings, requires its key like the real one, and has two more of its own:

    GET  /fake/state   {"active", "waiting", "peak", "served", "aborted", "failed"}: calls, counted
    POST /fake/knobs   {"tokens_per_s": 5}: changes knobs while it runs, answers with all of them

The text is a function of the seed and the prompt alone. Invariant: whatever it says is invented, and its
fingerprint, version and owner say so.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fleetmind.core.clock import Clock, Dice, SystemClock
from fleetmind.node import lifeline
from fleetmind.node.engines.fake_http import Connection, Request
from fleetmind.node.engines.fake_knobs import Knobs

VERSION = "fake-1 (simulated)"
_WORDS = (
    "the a model device token slot queue memory plan replica quiet bright small large green river stone cloud "
    "letter window garden engine signal number answer question morning evening and or but with from into over "
    "runs waits holds gives takes finds keeps moves reads writes learns"
)
WORDS = tuple(_WORDS.split())
YIELD_EVERY_TOKENS = 16
JSON_OPTIONS = {"separators": (",", ":")}


class Refusal(Exception):
    """An answer that is an error, in llama.cpp's shape."""

    def __init__(self, status: int, kind: str, message: str, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": status, "message": message, "type": kind, **more}}


@dataclass(frozen=True, slots=True)
class Reply:
    """An invented answer, before it is said. ``tool`` is (name, arguments) when a tool call was asked for."""

    pieces: tuple[str, ...]
    finish: str
    prompt_tokens: int
    tool: tuple[str, str] | None = None


class Slots:
    """As many calls at once as there are slots; the others wait in order. Counts what happened."""

    def __init__(self) -> None:
        self.active = self.peak = self.served = self.aborted = self.failed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def take(self, limit: int) -> None:
        """Wait for a slot."""
        if self.active >= limit or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # given to us while we were leaving
                    self.give_back(limit)
                elif turn in self._waiting:
                    self._waiting.remove(turn)
                raise
        else:
            self.active += 1
        self.peak = max(self.peak, self.active)

    def give_back(self, limit: int) -> None:
        """Free a slot."""
        self.active -= 1
        self.hand_on(limit)

    def hand_on(self, limit: int) -> None:
        """Let those in who now may."""
        while self._waiting and self.active < limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.active += 1
                turn.set_result(None)


class FakeServer:
    """The server. ``handle`` answers one request."""

    def __init__(self, *, model: str, api_key: str, knobs: Knobs, clock: Clock) -> None:
        self._model = model
        self._api_key = api_key
        self._knobs = knobs
        self._clock = clock
        self._ready_at_s = clock.monotonic_s() + knobs.load_s
        self._slots = Slots()
        self._calls = 0
        self._held = bytearray(os.urandom(1) * knobs.memory_bytes)

    async def handle(self, connection: Connection, request: Request) -> None:
        """Answer ``request`` as llama.cpp would."""
        try:
            await self._route(connection, request)
        except Refusal as refusal:
            if not connection.is_closing():  # it was said inside the stream
                connection.respond(refusal.status, _json(refusal.body))

    async def _route(self, connection: Connection, request: Request) -> None:
        if request.path == "/fake/knobs" or request.path == "/fake/state":
            self._check_key(request)
            connection.respond(200, _json(self._own(request)))
            return
        if self._knobs.silent:
            await asyncio.Event().wait()
        if request.path not in ("/health", "/v1/health"):
            self._check_key(request)
        if self._knobs.never_ready or self._clock.monotonic_s() < self._ready_at_s:
            raise Refusal(503, "unavailable_error", "Loading model")
        what = f"{request.method} {request.path}"
        if what in ("POST /v1/chat/completions", "POST /v1/completions"):
            await self._complete(connection, _object(request.body), is_chat="chat" in request.path)
        elif what == "POST /v1/embeddings":
            connection.respond(200, _json(self._embed(_object(request.body))))
        elif what in ("GET /health", "GET /v1/health"):
            connection.respond(200, b'{"status":"ok"}')
        elif what == "GET /props":
            connection.respond(200, _json(self._props()))
        elif what in ("GET /v1/models", "GET /models"):
            connection.respond(200, _json(self._models()))
        else:
            raise Refusal(404, "not_found_error", "File Not Found")

    def _check_key(self, request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {self._api_key}":
            raise Refusal(401, "authentication_error", "Invalid API Key")

    def _own(self, request: Request) -> Mapping[str, object]:
        if request.path == "/fake/knobs" and request.method == "POST":
            try:
                self._knobs = self._knobs.changed(_object(request.body))
            except ValueError as fault:
                raise Refusal(400, "invalid_request_error", str(fault)) from None
            self._slots.hand_on(self._knobs.slots)
        if request.path == "/fake/knobs":
            return asdict(self._knobs)
        names = ("active", "waiting", "peak", "served", "aborted", "failed")
        return {name: getattr(self._slots, name) for name in names}

    def _props(self) -> Mapping[str, object]:
        return {
            "default_generation_settings": {"n_ctx": self._knobs.context_tokens},
            "total_slots": self._knobs.slots,
            "model_alias": self._model,
            "modalities": {"vision": False, "audio": False},
            "build_info": VERSION,
        }

    def _models(self) -> Mapping[str, object]:
        entry = {"id": self._model, "object": "model", "created": 0, "owned_by": "fake (simulated)"}
        entry["meta"] = {"n_ctx": self._knobs.context_tokens, "n_embd": self._knobs.embedding_dimensions}
        return {"object": "list", "data": [entry]}

    def _embed(self, body: Mapping[str, Any]) -> Mapping[str, object]:
        size = self._knobs.embedding_dimensions
        if not size:
            raise Refusal(501, "not_supported_error", "This server does not support embeddings.")
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "invalid_request_error", '"input" must be a string or an array of strings')
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector(text, size)}
            for index, text in enumerate(texts)
        ]
        tokens = sum(count_tokens(text) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": self._model, "data": data, "usage": usage}

    def _vector(self, text: str, size: int) -> list[float]:
        dice = self._dice(text)
        raw = [2 * dice.uniform() - 1 for _ in range(size)]
        length = sum(number * number for number in raw) ** 0.5 or 1.0
        return [number / length for number in raw]

    def _dice(self, text: str) -> Dice:
        digest = hashlib.sha256(f"{self._knobs.seed}\0{text}".encode("utf-8", "surrogatepass")).digest()
        return Dice(int.from_bytes(digest[:8], "big"))

    # -- completions --------------------------------------------------------------------------------------------

    async def _complete(self, connection: Connection, body: Mapping[str, Any], *, is_chat: bool) -> None:
        reply = self._invent(body, is_chat=is_chat)
        async with self._slot():
            self._calls += 1
            call = _Call(self._model, f"fake-{self._calls}", is_chat, reply, self._clock)
            if body.get("stream"):
                await self._stream(connection, call, body)
            else:
                await self._whole(connection, call)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A slot, and the count of how its call ended."""
        try:
            await self._slots.take(self._knobs.slots)
            try:
                yield
            finally:
                self._slots.give_back(self._knobs.slots)
        except asyncio.CancelledError:
            self._slots.aborted += 1
            raise
        except Refusal:
            self._slots.failed += 1
            raise
        self._slots.served += 1

    def _invent(self, body: Mapping[str, Any], *, is_chat: bool) -> Reply:
        prompt = _prompt(body, is_chat=is_chat)
        prompt_tokens, context = count_tokens(prompt), self._knobs.context_tokens
        if prompt_tokens >= context:
            message = f"request ({prompt_tokens} tokens) exceeds the available context size ({context} tokens)"
            raise Refusal(400, "exceed_context_size_error", message, n_prompt_tokens=prompt_tokens, n_ctx=context)
        tool = _tool_call(body)
        if tool is not None:
            return Reply((tool[1],), "tool_calls", prompt_tokens, tool)
        wanted = self._knobs.reply_tokens
        limit = min(_max_tokens(body, wanted), context - prompt_tokens)
        dice, count = self._dice(prompt), min(wanted, limit)
        pieces = tuple((" " if at else "") + dice.choice(WORDS) for at in range(count))
        return Reply(pieces, "length" if limit < wanted else "stop", prompt_tokens)

    async def _whole(self, connection: Connection, call: "_Call") -> None:
        for at in range(len(call.reply.pieces)):
            if self._misbehaves(at) == "garbage":
                connection.respond(200, b"\xff\xfe\x00 this is no answer {")
                connection.drop()
                return
            await self._fail(at)
            await self._pace(call, at)
        connection.respond(200, call.whole())

    async def _stream(self, connection: Connection, call: "_Call", body: Mapping[str, Any]) -> None:
        await self._pace(call, 0)
        if self._misbehaves(0) == "error":
            await self._fail(0)
        connection.begin_stream()
        for at, piece in enumerate(call.reply.pieces):
            await self._pace(call, at)
            if self._misbehaves(at) == "garbage":
                await connection.send(b'data: {"choices":[{"delta":{"con\xff\xfe\x00\n\n\x01\x02 no answer')
                connection.drop()
                return
            try:
                await self._fail(at)
            except Refusal as refusal:
                await connection.send(b"data: " + _json(refusal.body) + b"\n\n")
                connection.drop()
                raise
            await connection.send(call.piece(piece, is_first=at == 0))
        for event in call.end(with_usage=bool((body.get("stream_options") or {}).get("include_usage"))):
            await connection.send(event)
        connection.end_stream()

    async def _pace(self, call: "_Call", at: int) -> None:
        """Wait until token ``at`` is due."""
        rate = self._knobs.tokens_per_s
        due_s = call.started_s + self._knobs.ttft_s + (at / rate if rate else 0.0)
        wait_s = due_s - self._clock.monotonic_s()
        if wait_s > 0:
            await self._clock.sleep(wait_s)
        elif at % YIELD_EVERY_TOKENS == 0:
            await asyncio.sleep(0)

    def _misbehaves(self, at: int) -> str | None:
        for kind in ("crash", "hang", "error", "garbage"):
            if getattr(self._knobs, f"{kind}_after_tokens") == at:
                return kind
        return None

    async def _fail(self, at: int) -> None:
        kind = self._misbehaves(at)
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "error":
            raise Refusal(500, "server_error", f"simulated failure after {at} tokens")


class _Call:
    """One answer being said: how it is written down."""

    def __init__(self, model: str, call_id: str, is_chat: bool, reply: Reply, clock: Clock) -> None:
        self.reply = reply
        self.started_s = clock.monotonic_s()
        self._clock = clock
        self._is_chat = is_chat
        kind = ("chat.completion" if is_chat else "text_completion") + "{}"
        self._facts = {"id": call_id, "created": int(clock.now_s()), "model": model, "system_fingerprint": VERSION}
        self._facts["object"] = kind.format("")
        self._chunk_facts = self._facts | {"object": kind.format(".chunk" if is_chat else "")}
        # Written once: a stream of a thousand tokens must not cost a thousand dictionaries.
        tail = json.dumps(self._chunk_facts, **JSON_OPTIONS)[1:]  # type: ignore[arg-type]
        if is_chat:
            self._head = b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":'
            self._tail = b"}}]," + tail.encode() + b"\n\n"
        else:
            self._head = b'data: {"choices":[{"finish_reason":null,"index":0,"logprobs":null,"text":'
            self._tail = b"}]," + tail.encode() + b"\n\n"

    def piece(self, text: str, *, is_first: bool) -> bytes:
        """The event of one token; a chat begins with one that only names the role."""
        role = self._event([self._delta({"role": "assistant", "content": None})]) if is_first and self._is_chat else b""
        if self.reply.tool is not None:
            return role + self._event([self._delta({"tool_calls": [self._tool_call() | {"index": 0}]})])
        return role + self._head + json.dumps(text).encode() + self._tail

    def end(self, *, with_usage: bool) -> Iterator[bytes]:
        """The events after the last token."""
        if self._is_chat:
            choice: Mapping[str, object] = self._delta({}) | {"finish_reason": self.reply.finish}
        else:
            choice = {"finish_reason": self.reply.finish, "index": 0, "logprobs": None, "text": ""}
        counts = {"usage": self._usage(), "timings": self._timings()}
        yield self._event([choice], **({} if with_usage else {"timings": counts["timings"]}))
        if with_usage:
            yield self._event([], **counts)
        yield b"data: [DONE]\n\n"

    def whole(self) -> bytes:
        """The answer in one piece."""
        text = "".join(self.reply.pieces)
        choice: dict[str, object] = {"finish_reason": self.reply.finish, "index": 0}
        if self.reply.tool is not None:
            choice["message"] = {"role": "assistant", "content": None, "tool_calls": [self._tool_call()]}
        elif self._is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "logprobs": None}
        return _json({"choices": [choice], **self._facts, "usage": self._usage(), "timings": self._timings()})

    def _event(self, choices: list[Mapping[str, object]], **more: object) -> bytes:
        return b"data: " + _json({"choices": choices, **self._chunk_facts, **more}) + b"\n\n"

    def _delta(self, delta: Mapping[str, object]) -> dict[str, object]:
        return {"finish_reason": None, "index": 0, "delta": delta}

    def _tool_call(self) -> dict[str, object]:
        assert self.reply.tool is not None
        name, arguments = self.reply.tool
        return {"id": "call_fake_1", "type": "function", "function": {"name": name, "arguments": arguments}}

    def _usage(self) -> Mapping[str, object]:
        prompt, completion = self.reply.prompt_tokens, len(self.reply.pieces)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _timings(self) -> Mapping[str, object]:
        took_ms = max(1e-3, (self._clock.monotonic_s() - self.started_s) * 1000)
        count = len(self.reply.pieces)
        return {
            "cache_n": 0,
            "prompt_n": self.reply.prompt_tokens,
            "prompt_ms": 0.0,
            "predicted_n": count,
            "predicted_ms": took_ms,
            "predicted_per_token_ms": took_ms / max(1, count),
            "predicted_per_second": count / took_ms * 1000,
        }


def count_tokens(text: str) -> int:
    """What this engine calls tokens: words, and at least one for every 16 characters."""
    return max(len(text.split()), len(text) // 16, 1)


def _json(value: object) -> bytes:
    return json.dumps(value, **JSON_OPTIONS).encode()  # type: ignore[arg-type]


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Refusal(500, "server_error", "parse error: the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refusal(400, "invalid_request_error", "the body must be a JSON object")
    return found


def _prompt(body: Mapping[str, Any], *, is_chat: bool) -> str:
    found = body.get("messages" if is_chat else "prompt")
    if is_chat and not (isinstance(found, list) and found and all(isinstance(each, dict) for each in found)):
        raise Refusal(400, "invalid_request_error", '"messages" must be an array of objects')
    if found is None or (not is_chat and not isinstance(found, str | list)):
        raise Refusal(400, "invalid_request_error", '"prompt" is missing')
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _max_tokens(body: Mapping[str, Any], default: int) -> int:
    for name in ("max_completion_tokens", "max_tokens", "n_predict"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return max(value, 1)
    return default


def _tool_call(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """The name and arguments of a tool call when ``tool_choice`` demands one."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    functions = (
        [each.get("function", {}) for each in tools if isinstance(each, dict)] if isinstance(tools, list) else []
    )
    if isinstance(choice, dict):
        wanted = choice.get("function", {}).get("name")
        functions = [function for function in functions if function.get("name") == wanted]
    elif choice != "required":
        return None
    if not functions:
        raise Refusal(400, "invalid_request_error", "tool_choice names no tool")
    schema = functions[0].get("parameters") or {}
    samples: Mapping[str, object] = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    arguments = {
        name: (rule.get("enum") or [samples.get(str(rule.get("type")), "simulated")])[0]
        for name, rule in (schema.get("properties") or {}).items()
        if isinstance(rule, dict)
    }
    return str(functions[0].get("name")), json.dumps(arguments)


async def _serve(order: Mapping[str, Any], knobs: Knobs) -> None:
    server = FakeServer(model=order["model"], api_key=order["api_key"], knobs=knobs, clock=SystemClock())
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(
        lambda: Connection(server.handle), order["host"], order["port"], backlog=4096, reuse_address=True
    )
    print(f"fake engine (simulated) serves {order['model']} at port {order['port']}", flush=True)  # noqa: T201
    async with listening:
        await listening.serve_forever()


def main() -> None:
    """Serve until told to end."""
    order = json.load(sys.stdin)  # from a server that died before it gave one this comes back empty, and fails
    knobs = Knobs().changed(order["knobs"])
    if knobs.outlives_server:
        lifeline.shed()
    else:
        lifeline.hold()
    assert order["api_key"]
    if knobs.crash_on_start:
        sys.exit("simulated crash at the start")
    if knobs.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for at in range(0, knobs.log_bytes, 64):
        print(f"{at:>63}")  # noqa: T201 - this is the replica's log
    asyncio.run(_serve(order, knobs))


if __name__ == "__main__":
    main()
