"""What ``fleetmind up`` says once it serves. Pure: the started server's description in, text out.

The curl line works as pasted: with the first key where one was just made, else with the token of this start, read from
its file. A key is shown once and only in the answer of the start that made it.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

QUESTION = "Say hello in one sentence."


def banner(document: Mapping[str, Any], *, is_detached: bool = False) -> str:
    """The text, ending with a line break."""
    url, key = document["url"], document["key"]
    lines = [
        "",
        f"Fleetmind {document['version']} is serving. It took {document['ready_s']:.1f} s.",
        "",
        f"  Endpoint  {url}/v1",
        f"  Page      {url}/#key={key}" if key else f"  Page      {url}/",
    ]
    if key:
        lines += [f"  Key       {key}", "            shown this once; only a hash of it is stored"]
    else:
        lines += [f"  Key       yours, or this start's: cat {shlex.quote(document['token_file'])}"]
    lines += _listed("Devices", document["devices"] or ["none"])
    lines += _listed("Models", document["models"] or ["none yet: fleetmind models add smollm2-135m-instruct"])
    lines += _listed("Note", document["notes"])
    lines += ["", "Try it:", "", *(f"  {line}" for line in curl(document)), ""]
    lines += [f'  fleetmind ask "{QUESTION}"', "  fleetmind chat", ""]
    lines += ["Stop it with: fleetmind down" if is_detached else "Ctrl-C stops it.", ""]
    return "\n".join(lines)


def curl(document: Mapping[str, Any]) -> list[str]:
    """A command that asks a model, in lines that a shell joins."""
    key = document["key"] or f"$(cat {shlex.quote(document['token_file'])})"
    body = {"model": _model(document), "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
    certificate = document.get("certificate")
    trust = f" --cacert {shlex.quote(certificate)}" if certificate else ""
    return [
        f"curl -sS{trust} {document['url']}/v1/chat/completions \\",
        f'  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\',
        f"  -d {shlex.quote(json.dumps(body))}",
    ]


def _model(document: Mapping[str, Any]) -> str:
    """A model to show: one that is ready, one that will be, or the one everybody can have."""
    names = [words.partition(":") for words in document["models"]]
    ready = [name for name, _, state in names if state.strip() == "ready"]
    return str((ready or [name for name, _, _ in names] or document["preload"] or ["smollm2-135m-instruct"])[0])


def _listed(title: str, entries: list[str]) -> list[str]:
    """Entries below each other behind one title."""
    return [f"  {title if position == 0 else '':<9} {entry}" for position, entry in enumerate(entries)]
