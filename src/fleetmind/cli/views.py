"""Answers of the server as a person reads them.

Pure: JSON in, something Rich can draw out. Whatever is simulated says so wherever it shows; what is not known is a
dash, never a zero.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetmind.core.types import format_bytes

Document = Mapping[str, Any]

UNKNOWN = "–"
SIMULATED = " (simulated)"
DEVICES_SHOWN = 8
"""Devices named in one line of refusals."""
_STYLES = {
    "ready": "green", "ok": "green", "loading": "yellow", "starting": "yellow", "draining": "yellow", "warn": "yellow",
    "unplaced": "yellow", "failed": "red", "fail": "red", "stopped": "dim",
}  # fmt: skip


def status(document: Document) -> RenderableType:
    """The server at one moment."""
    state = "ready" if document["ready"] else "not ready"
    head = Text.assemble(
        ("Fleetmind ", "bold"),
        document["version"],
        f" at {document['url']}, up {duration(document['uptime_s'])}, ",
        (state, "green" if document["ready"] else "yellow"),
    )
    calls = document["calls"]
    parts: list[RenderableType] = [head]
    if document["is_simulated"]:
        parts.append(Text("Simulated: some devices or answers are invented.", style="yellow"))
    parts.append(Text(f"Calls: {calls['outstanding']} being answered, {calls['queued']} waiting"))
    parts += [Text(""), devices(document["devices"]), Text(""), models(document["models"])]
    if document["replicas"]:
        parts += [Text(""), replicas(document["replicas"])]
    if document["refusals"]:
        parts += [Text(""), refusals(document["refusals"])]
    parts += [
        Text(f"Loop {loop['name']}: {loop['state']}, {loop['last_error']}", style="red")
        for loop in document["loops"]
        if loop["state"] not in ("running", "waiting") and loop["last_error"]
    ]
    return Group(*parts)


def devices(documents: Iterable[Document]) -> RenderableType:
    """Devices and how full they are."""
    table = _table("Device", "Kind", "Memory used", "of", "Granted", "Busy", "°C", "W", "Fault")
    for device in documents:
        table.add_row(
            _labelled(device),
            device["kind"],
            _size(device["memory_bytes_used"]),
            _size(device["memory_bytes_total"]),
            _size(device["memory_bytes_granted"]),
            _share(device["utilisation"]),
            _number(device["temperature_c"]),
            _number(device["power_w"]),
            Text(device["fault"] or "", style="red"),
        )
    return table


def models(documents: Iterable[Document]) -> RenderableType:
    """The catalogue."""
    table = _table("Model", "State", "Source", "Replicas", "Context", "Slots", "Weights", "Why")
    for model in documents:
        table.add_row(
            _labelled(model),
            _state(model["state"]),
            model["source"],
            f"{model['replicas_ready']}/{model['replicas_wanted']}",
            str(model["context_tokens"] or UNKNOWN),
            str(model["slots"]),
            _size(model["weights_bytes"]),
            model["reason"],
        )
    return table if table.row_count else Text("No models yet. Add one: fleetmind models add smollm2-135m-instruct")


def replicas(documents: Iterable[Document]) -> RenderableType:
    """Replicas as they were last seen."""
    table = _table("Replica", "Model", "State", "On", "Memory", "Calls", "Process", "Why")
    for replica in documents:
        table.add_row(
            replica["id"],
            replica["model"] + (SIMULATED if replica["is_simulated"] else ""),
            _state(replica["state"]),
            ", ".join(replica["devices"]) or UNKNOWN,
            _size(replica["memory_bytes"] or None),
            f"{replica['outstanding']}/{replica['slots']}",
            str(replica["pid"] or UNKNOWN),
            replica["reason"],
        )
    return table


def refusals(documents: Iterable[Document]) -> RenderableType:
    """Why models are not on devices; devices that say the same share a line."""
    devices_by_reason: dict[tuple[str, str], list[str]] = {}
    for refusal in documents:
        devices_by_reason.setdefault((refusal["model"], refusal["message"]), []).append(refusal["device"] or "all")
    table = _table("Not placed", "On", "Why")
    for (model, reason), names in devices_by_reason.items():
        shown = ", ".join(names[:DEVICES_SHOWN])
        more = f" and {len(names) - DEVICES_SHOWN} more" if len(names) > DEVICES_SHOWN else ""
        table.add_row(model, shown + more, reason)
    return table


def keys(documents: Iterable[Document]) -> RenderableType:
    """Keys without their text."""
    table = _table("Id", "Name", "May", "Models", "Made", "Ends", "Last used")
    for key in documents:
        ends = moment(key["expires_at_s"])
        if key["revoked_at_s"] is not None:
            ends = f"revoked {moment(key['revoked_at_s'])}"
        table.add_row(
            key["id"],
            key["name"],
            ", ".join(key["scopes"]),
            ", ".join(key["models"]) or "all",
            moment(key["created_at_s"]),
            ends,
            moment(key["last_used_at_s"]),
        )
    return table if table.row_count else Text("No keys yet. Make one: fleetmind keys create NAME")


def fit(document: Document) -> RenderableType:
    """Whether a model fits, device by device."""
    model, needs = document["model"], document["footprint"]
    about = f"{model['architecture']} {model['quantisation']}, trained for {model['context_length_trained']} tokens"
    sizes = ", ".join(
        f"{name} {format_bytes(needs[f'{key}_bytes'])}"
        for name, key in (("weights", "weights"), ("KV cache", "kv"), ("compute", "compute"), ("overhead", "overhead"))
    )
    table = _table("Device", "Fits", "Needs", "Free", "Context at most", "Why")
    for device in document["devices"]:
        table.add_row(
            _labelled(device),
            Text("yes", style="green") if device["fits"] else Text("no", style="red"),
            format_bytes(device["memory_bytes_needed"]),
            format_bytes(device["memory_bytes_free"]),
            str(device["context_tokens_max"] or UNKNOWN),
            device["reason"],
        )
    return Group(Text(about), Text(f"Needs {format_bytes(needs['total_bytes'])}: {sizes}"), Text(""), table)


def configuration(values: Iterable[Document]) -> RenderableType:
    """Settings, and where each value came from."""
    table = _table("Setting", "Value", "Unit", "From")
    for value in values:
        source = value["source"]
        where = source if source == "default" else f"{source}: {value['where']}"
        table.add_row(
            value["name"],
            _value(value["value"]),
            value["unit"],
            Text(where, style="dim" if source == "default" else ""),
        )
    return table


def doctor(checks: Iterable[Document]) -> RenderableType:
    """Checks, and how to mend what is wrong."""
    table = _table("Check", "", "What was seen", "What to do")
    for check in checks:
        table.add_row(check["name"], _state(check["status"]), check["detail"], check["fix"])
    return table


def duration(seconds: float) -> str:
    """``"3 h 2 min"``, ``"12 s"``."""
    whole = int(seconds)
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for position, (size, name) in enumerate(units):
        if whole >= size:
            rest = (whole % size) // units[position + 1][0] if position + 1 < len(units) else 0
            return f"{whole // size} {name}" + (f" {rest} {units[position + 1][1]}" if rest else "")
    return "0 s"


def moment(at_s: float | None) -> str:
    """A time in UTC; a dash for none."""
    return UNKNOWN if at_s is None else datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _labelled(document: Document) -> str:
    """Its name, saying that it is simulated where the name doesn't."""
    name = str(document["name"])
    return name + SIMULATED if document["is_simulated"] and not name.endswith(SIMULATED) else name


def _value(value: object) -> str:
    """A setting's value as one would write it in the environment."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _state(word: str) -> Text:
    return Text(word, style=_STYLES.get(word, ""))


def _size(size_bytes: float | None) -> str:
    return UNKNOWN if size_bytes is None else format_bytes(size_bytes)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"
