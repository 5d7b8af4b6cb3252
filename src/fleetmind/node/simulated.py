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
from pathlib import Path
from typing import Any

import yaml

from fleetmind.core.clock import Clock
from fleetmind.core.errors import ConfigurationError
from fleetmind.core.types import DeviceId, parse_bytes
from fleetmind.node.protocol import Device, DeviceKind, DeviceProcess, DeviceReading

FILE_BYTES_MAX = 262144
DEVICES_MAX = 4096
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
    file_ = _File(path)
    if len(text) > FILE_BYTES_MAX:
        raise file_.fault(None, f"larger than {FILE_BYTES_MAX} bytes")
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        top = file_.mapping(loader, root, {"devices": None})
    except yaml.MarkedYAMLError as fault:
        raise file_.fault(fault.problem_mark, fault.problem or "not YAML") from None
    except (yaml.YAMLError, RecursionError, ValueError) as fault:
        raise file_.fault(None, f"not YAML: {fault}") from None
    finally:
        loader.dispose()
    listed = top.get("devices")
    if listed is None or not isinstance(listed.node, yaml.SequenceNode) or not listed.node.value:
        raise file_.fault(root.start_mark if root else None, "needs a list of devices under 'devices:'")
    found: dict[DeviceId, _Simulated] = {}
    for node in listed.node.value:
        for entry in _devices(file_, file_.mapping(loader, node, _KEYS), node, len(found)):
            if entry.device.id in found:
                raise file_.fault(node.start_mark, f"a second device named {entry.device.id!r}")
            found[entry.device.id] = entry
            if len(found) > DEVICES_MAX:
                raise file_.fault(node.start_mark, f"more than {DEVICES_MAX} devices")
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of the file and where it stands."""

    node: yaml.Node
    value: Any


class _File:
    """Says where a fault is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fault(self, mark: Any, message: str) -> ConfigurationError:
        line = f", line {mark.line + 1}" if mark is not None else ""
        return ConfigurationError(
            f"{self._path}{line}: {message}", hint="see fleetmind.node.simulated", param="node.devices_file"
        )

    def mapping(self, loader: yaml.SafeLoader, node: Any, keys: Mapping[str, Any]) -> dict[str, _Value]:
        """The entries of a mapping whose keys are all among ``keys``, each only once."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fault(node.start_mark if node else None, f"expected entries like {', '.join(keys)}")
        found: dict[str, _Value] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key not in keys:
                raise self.fault(key_node.start_mark, f"unknown entry {key!r}; known are {', '.join(keys)}")
            if key in found:
                raise self.fault(key_node.start_mark, f"{key} is there twice")
            value = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            if key == "labels":
                value = loader.construct_document(value_node)
            found[key] = _Value(value_node, value)
        return found


def _devices(file: _File, entry: Mapping[str, _Value], node: Any, index: int) -> list[_Simulated]:
    values: dict[str, Any] = {}
    for key, given in entry.items():
        try:
            values[key] = _KEYS[key](given.value)
        except (ValueError, TypeError, AttributeError) as fault:
            raise file.fault(given.node.start_mark, f"{key}: {fault}") from None
    for needed in ("name", "memory"):
        if needed not in values:
            raise file.fault(node.start_mark, f"a device needs a {needed}")
    if values.get("foreign_memory", 0) > values["memory"]:
        raise file.fault(entry["foreign_memory"].node.start_mark, "foreign_memory is more than memory")
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


def _name(value: str) -> str:
    if not value or len(value) > 64 or not all(char.isalnum() or char in "-_." for char in value):
        raise ValueError(f"{value!r} is no name; use up to 64 letters, digits, '-', '_' and '.'")
    return value


def _kind(value: str) -> DeviceKind:
    if value not in set(DeviceKind):
        raise ValueError(f"{value!r} is no kind; use {' or '.join(DeviceKind)}")
    return DeviceKind(value)


def _memory(value: str) -> int:
    size = parse_bytes(value)
    if size > MEMORY_BYTES_MAX:
        raise ValueError(f"{value} is more than a device can have")
    return size


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isascii() or not value.isdigit() or len(value) > 9 or not least <= int(value) <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return int(value)

    return read


def _number(least: float, most: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise ValueError(f"{value!r} is not a number from {least:g} to {most:g}")
        return number

    return read


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 64:
        raise ValueError("expected at most 64 names with values")
    if any(not isinstance(part, str | int | float) for pair in value.items() for part in pair):
        raise ValueError("names and values must be plain")
    return {str(name)[:256]: str(text)[:256] for name, text in value.items()}


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
