"""Simulated devices from a YAML file, to try placements that this machine could not hold.

The file, in full (only ``name`` and ``memory`` are needed)::

    devices:
      - name: card             # its id; with a count: card-0, card-1, …
        kind: cuda             # cuda (default) or cpu
        memory: 11GiB
        count: 7               # default 1
        foreign_memory: 2GiB   # held by somebody else, default 0
        cores: 16              # of a cpu
        utilisation: 0.3       # from 0 to 1; this and the next two are left out of readings when not given
        temperature_c: 61
        power_w: 120
        labels: {rack: left}

Whatever the file cannot mean is refused with its line. Invariant: every device from here is labelled simulated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from fleetmind.core.clock import Clock
from fleetmind.core.errors import ConfigurationError
from fleetmind.core.types import DeviceId, parse_bytes
from fleetmind.node.protocol import Device, DeviceKind, DeviceProcess, DeviceReading

FILE_BYTES_MAX = 65536
DEVICES_MAX = 4096
LABELS_MAX = 64
DEPTH_MAX = 32
MEMORY_BYTES_MAX = 1 << 50
FOREIGN_PID = 0
"""The pid of the simulated process that holds foreign memory; no real process has it."""


@dataclass(frozen=True, slots=True)
class _Simulated:
    device: Device
    foreign_bytes: int
    utilisation: float | None
    temperature_c: float | None
    power_w: float | None


_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class SimulatedDevices:
    """The devices of ``path``. Raises ConfigurationError, with the line, when the file can't be used."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._clock = clock
        self._entries = _load(path)

    def find(self) -> tuple[Device, ...]:
        """The devices of the file."""
        return tuple(entry.device for entry in self._entries)

    def read(self) -> tuple[DeviceReading, ...]:
        """What the file says of them: foreign memory, and the values it gives. Our replicas the daemon adds."""
        return tuple(
            DeviceReading(
                device_id=entry.device.id,
                at_s=self._clock.now_s(),
                memory_bytes_used=entry.foreign_bytes,
                utilisation=entry.utilisation,
                temperature_c=entry.temperature_c,
                power_w=entry.power_w,
                processes=(
                    (DeviceProcess(FOREIGN_PID, "foreign (simulated)", entry.foreign_bytes),)
                    if entry.foreign_bytes
                    else ()
                ),
            )
            for entry in self._entries
        )


def _load(path: Path) -> tuple[_Simulated, ...]:
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as fault:
        raise ConfigurationError(f"{path}: {fault.strerror}", param="node.devices_file") from fault
    where = _File(path)
    if len(text) > FILE_BYTES_MAX:
        raise where.fault(None, f"larger than {FILE_BYTES_MAX} bytes")
    if max(accumulate((_STEPS.get(byte, 0) for byte in text), initial=0)) > DEPTH_MAX:
        raise where.fault(None, "nested too deeply")  # the parser would take seconds to find that out
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as fault:
        raise where.fault(fault.problem_mark, fault.problem or "not YAML") from None
    except (yaml.YAMLError, RecursionError) as fault:
        raise where.fault(None, f"not YAML: {fault}") from None
    return _devices(where, root)


def _devices(where: "_File", root: Any) -> tuple[_Simulated, ...]:
    listed = where.entries(root, {"devices": None}).get("devices")
    if not isinstance(listed, yaml.SequenceNode) or not listed.value:
        raise where.fault(root.start_mark if root else None, "needs a list of devices under 'devices:'")
    found: dict[DeviceId, _Simulated] = {}
    for node in listed.value:
        for entry in _entry(where, node, len(found)):
            if entry.device.id in found:
                raise where.fault(node.start_mark, f"a second device named {entry.device.id!r}")
            found[entry.device.id] = entry
            if len(found) > DEVICES_MAX:
                raise where.fault(node.start_mark, f"more than {DEVICES_MAX} devices")
    return tuple(found.values())


class _File:
    """Says where a fault is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fault(self, mark: Any, message: str) -> ConfigurationError:
        line = f", line {mark.line + 1}" if mark is not None else ""
        return ConfigurationError(
            f"{self._path}{line}: {message}", hint="see fleetmind.node.simulated", param="node.devices_file"
        )

    def entries(self, node: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        """The nodes of a mapping whose keys are all among ``known``, each only once."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fault(node.start_mark if node else None, f"expected entries like {', '.join(known)}")
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key not in known:
                raise self.fault(key_node.start_mark, f"unknown entry {key!r}; known are {', '.join(known)}")
            if key in found:
                raise self.fault(key_node.start_mark, f"{key} is there twice")
            found[key] = value_node
        return found


def _entry(where: _File, node: Any, index: int) -> list[_Simulated]:
    nodes = where.entries(node, _KEYS)
    values: dict[str, Any] = {}
    for key, value_node in nodes.items():
        try:
            values[key] = _KEYS[key](value_node)
        except ValueError as fault:
            raise where.fault(value_node.start_mark, f"{key}: {fault}") from None
    for needed in ("name", "memory"):
        if needed not in values:
            raise where.fault(node.start_mark, f"a device needs a {needed}")
    if values.get("foreign_memory", 0) > values["memory"]:
        raise where.fault(nodes["foreign_memory"].start_mark, "foreign_memory is more than memory")
    count, kind = values.get("count"), values.get("kind", DeviceKind.CUDA)
    names = [values["name"]] if count is None else [f"{values['name']}-{at}" for at in range(count)]
    return [
        _Simulated(
            device=Device(
                id=DeviceId(name),
                kind=kind,
                name=f"{name} (simulated)",
                memory_bytes_total=values["memory"],
                index=index + at,
                cores=values.get("cores", 0),
                is_simulated=True,
                labels=values.get("labels", {}),
            ),
            foreign_bytes=values.get("foreign_memory", 0),
            utilisation=values.get("utilisation"),
            temperature_c=values.get("temperature_c"),
            power_w=values.get("power_w"),
        )
        for at, name in enumerate(names)
    ]


def _text(node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("expected a plain value")
    return str(node.value)


def _name(node: Any) -> str:
    value = _text(node)
    if not value or len(value) > 64 or not all(char.isalnum() or char in "-_." for char in value):
        raise ValueError(f"{value!r} is no name; use up to 64 letters, digits, '-', '_' and '.'")
    return value


def _kind(node: Any) -> DeviceKind:
    value = _text(node)
    if value not in set(DeviceKind):
        raise ValueError(f"{value!r} is no kind; use {' or '.join(DeviceKind)}")
    return DeviceKind(value)


def _memory(node: Any) -> int:
    size = parse_bytes(_text(node))
    if size > MEMORY_BYTES_MAX:
        raise ValueError(f"{_text(node)} is more than a device can have")
    return size


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def read(node: Any) -> int:
        value = _text(node)
        if not value.isascii() or not value.isdigit() or len(value) > 9 or not least <= int(value) <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return int(value)

    return read


def _number(least: float, most: float) -> Callable[[Any], float]:
    def read(node: Any) -> float:
        try:
            number = float(_text(node))
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise ValueError(f"{_text(node)!r} is not a number from {least:g} to {most:g}")
        return number

    return read


def _labels(node: Any) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode) or len(node.value) > LABELS_MAX:
        raise ValueError(f"expected at most {LABELS_MAX} names with values")
    return {_text(name)[:256]: _text(value)[:256] for name, value in node.value}


_KEYS: Mapping[str, Callable[[Any], Any]] = {
    "name": _name,
    "kind": _kind,
    "memory": _memory,
    "count": _whole(1, DEVICES_MAX),
    "foreign_memory": _memory,
    "cores": _whole(1, 4096),
    "utilisation": _number(0, 1),
    "temperature_c": _number(-100, 200),
    "power_w": _number(0, 10000),
    "labels": _labels,
}
