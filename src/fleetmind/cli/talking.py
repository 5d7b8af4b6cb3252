"""``fleetmind ask`` and ``fleetmind chat``: talk to a model through the running server.

The answer is printed as it comes. While the model is loading the server says when to ask again, and the wait is shown.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetmind.cli.exits import ServerRefused
from fleetmind.cli.options import Home, Json
from fleetmind.cli.output import Output
from fleetmind.cli.presence import connect, resolve_home
from fleetmind.cli.waiting import model_of, not_served
from fleetmind.core.clock import SystemClock, pause
from fleetmind.core.errors import FleetmindError

if TYPE_CHECKING:
    from fleetmind.cli.client import Client

CHAT_PATH = "/v1/chat/completions"
RETRY_S_MAX = 5.0
PROMPT = ">>> "
CHAT_HELP = """\
/model NAME   go on with another model
/clear        forget what was said
/exit         end (or Ctrl-D); Ctrl-C stops an answer"""

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Default: the first chat model, real and ready ones first.")
]
System = Annotated[str | None, typer.Option("--system", help="An instruction given before the conversation.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="The longest answer.")]
WaitS = Annotated[float, typer.Option("--wait-s", min=0, help="Longest wait for a model that is loading or busy.")]


def ask(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="How freely it chooses.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the answer as it comes.")] = True,
    wait_s: WaitS = 300.0,
    home: Home = None,
    json: Json = False,
) -> None:
    """Ask a model one thing and print its answer.

    \b
    fleetmind ask "Say hello."
    git diff | fleetmind ask - --system "Write a commit message for this diff."
    """
    output = Output(is_json=json)
    client = connect(resolve_home(home))
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise typer.BadParameter("there is nothing to ask")
    chosen = model or choose_model(client)
    label_simulated(client, chosen, output)
    body: dict[str, object] = {"model": chosen, "messages": _messages(system, text)}
    body |= {} if max_tokens is None else {"max_tokens": max_tokens}
    body |= {} if temperature is None else {"temperature": temperature}
    if json or not stream:
        reply = patiently(lambda: client.post(CHAT_PATH, body), client, str(body["model"]), output, wait_s)
        output.result(reply, lambda: reply["choices"][0]["message"]["content"] or "")
        return
    for part in answer(client, body, output, wait_s):
        output.write(part)
    output.write("\n")


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Default: the first chat model, real and ready ones first.")
    ] = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    wait_s: WaitS = 300.0,
    home: Home = None,
    json: Json = False,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D ends. With --json: a line of JSON per answer."""
    output = Output(is_json=json)
    client = connect(resolve_home(home))
    talk = Conversation(client, model or choose_model(client), output, system=system, max_tokens=max_tokens)
    talk.wait_s = wait_s
    label_simulated(client, talk.model, output)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - its import gives input() editing and history

        output.say(f"Talking to {talk.model}. /help shows what else you can type.")
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if not talk.obey(line):
                return
        elif line:
            talk.say(line)


class Conversation:
    """What was said so far, and with whom."""

    def __init__(
        self, client: "Client", model: str, output: Output, *, system: str | None = None, max_tokens: int | None = None
    ) -> None:
        self.model = model
        self.wait_s = 300.0
        self._client = client
        self._output = output
        self._system = system
        self._max_tokens = max_tokens
        self.messages = _messages(system, None)

    def say(self, text: str) -> None:
        """Say ``text``, print the answer, and remember both. What went wrong is told, and nothing of it remembered."""
        body: dict[str, object] = {"model": self.model, "messages": [*self.messages, _message("user", text)]}
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        parts: list[str] = []
        try:
            for part in answer(self._client, body, self._output, self.wait_s):
                parts.append(part)
                if not self._output.is_json:
                    self._output.write(part)
        except KeyboardInterrupt:
            self._output.say("\n(stopped)")
        except FleetmindError as error:
            self._end_line(parts)
            self._output.fail(error)
            if error.code == "context_length_exceeded":
                self._output.say("  The conversation has grown too long for the model; /clear forgets it.")
            return
        else:
            self._end_line(parts)
        if parts:
            self.messages += [_message("user", text), _message("assistant", "".join(parts))]
        if self._output.is_json:
            self._output.result({"model": self.model, "answer": "".join(parts)}, str)

    def obey(self, line: str) -> bool:
        """Do what a line beginning with / asks; False to end."""
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit", "/bye"):
            return False
        if command == "/clear":
            self.messages = _messages(self._system, None)
            self._output.say("Forgotten.")
        elif command == "/model" and argument.strip():
            self._switch(argument.strip())
        elif command == "/help":
            self._output.say(CHAT_HELP)
        else:
            self._output.say(f"{command} is not known here.\n{CHAT_HELP}")
        return True

    def _switch(self, model: str) -> None:
        try:
            self.model = model_of(self._client, model)["name"]
        except FleetmindError as error:
            self._output.fail(error)
        else:
            self._output.say(f"Talking to {self.model}.")

    def _end_line(self, parts: list[str]) -> None:
        if parts and not self._output.is_json:
            self._output.write("\n")


def choose_model(client: "Client") -> str:
    """The first model that can chat: real ones first, of those the ready ones. Raises ServerRefused for none."""
    order = ("ready", "loading", "unplaced", "failed")
    models = [model for model in client.get("/api/models")["models"] if "chat" in model["abilities"]]
    if not models:
        raise ServerRefused(
            "There is no model to talk to.",
            code="model_not_found",
            hint="Add one: fleetmind models add smollm2-135m-instruct",
        )
    return str(min(models, key=lambda model: (model["is_simulated"], order.index(model["state"])))["name"])


def label_simulated(client: "Client", model: str, output: Output) -> None:
    """Say on standard error that a model's answers are invented, if they are."""
    found = [one for one in client.get("/api/models")["models"] if one["name"] == model]
    if found and found[0]["is_simulated"]:
        output.say(f"({model} is simulated: its answers are invented)")


def answer(client: "Client", body: Mapping[str, object], output: Output, wait_s: float) -> Iterator[str]:
    """The parts of the answer as they come. Says on standard error when the answer was cut at a limit."""
    asked = {**body, "stream": True}
    with ExitStack() as stack:

        def ask_once() -> Iterator[dict[str, Any]]:
            return stack.enter_context(client.stream(CHAT_PATH, asked))

        for event in patiently(ask_once, client, str(body["model"]), output, wait_s):
            for choice in event.get("choices") or ():
                if part := (choice.get("delta") or {}).get("content"):
                    yield part
                if choice.get("finish_reason") == "length":
                    output.say("\n(cut at the limit of tokens)")


def patiently(
    ask_once: Callable[[], Any],
    client: "Client",
    model: str,
    output: Output,
    wait_s: float,
    *,
    wait: Callable[[float], None] = pause,
) -> Any:
    """Ask until there is an answer, as long as the server says that asking again helps and ``wait_s`` lasts.

    Raises what the server said last, or at once when the model has failed.
    """
    clock = SystemClock()
    until_s = clock.monotonic_s() + wait_s
    try:
        return ask_once()
    except ServerRefused as error:
        refused = error
    with output.waiting(f"{model}: {refused.message}") as tell:
        while refused.retry_after_s is not None and clock.monotonic_s() < until_s:
            state = model_of(client, model)
            if state["state"] == "failed":
                raise not_served(model, state["reason"])
            tell(f"{model}: {state['reason'] or refused.message}")
            wait(min(refused.retry_after_s, RETRY_S_MAX, max(0.0, until_s - clock.monotonic_s())))
            try:
                return ask_once()
            except ServerRefused as error:
                refused = error
    raise refused


def _read_line() -> str | None:
    """The next line, None at the end. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            return input(PROMPT if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n(Ctrl-D ends)\n")


def _messages(system: str | None, text: str | None) -> list[dict[str, str]]:
    given = (("system", system), ("user", text))
    return [_message(role, content) for role, content in given if content is not None]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
