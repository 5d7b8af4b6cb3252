"""Simulated devices say what the file says; what the file cannot mean is refused with its line."""

from pathlib import Path

import pytest

from fleetmind.core.clock import SystemClock
from fleetmind.core.errors import ConfigurationError
from fleetmind.core.types import GIB
from fleetmind.node.protocol import DeviceKind
from fleetmind.node.simulated import SimulatedDevices


def load(tmp_path: Path, text: str | bytes) -> SimulatedDevices:
    path = tmp_path / "devices.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return SimulatedDevices(path, SystemClock())


def test_seven_cards_and_a_box(tmp_path: Path) -> None:
    source = load(
        tmp_path,
        "devices:\n"
        "  - {name: card, memory: 11GiB, count: 7, foreign_memory: 2GiB, utilisation: 0.3,"
        " temperature_c: 61, power_w: 120, labels: {rack: left}}\n"
        "  - name: box\n    kind: cpu\n    memory: 64 GiB\n    cores: 16\n",
    )
    *cards, box = source.find()
    assert [card.id for card in cards] == [f"card-{index}" for index in range(7)]
    assert {card.memory_bytes_total for card in cards} == {11 * GIB}
    assert {card.kind for card in cards} == {DeviceKind.CUDA}
    assert cards[3].labels == {"rack": "left"}
    assert (box.id, box.kind, box.cores, box.index) == ("box", DeviceKind.CPU, 16, 7)
    assert all(device.is_simulated and "simulated" in device.name for device in source.find())
    reading, *_, last = source.read()
    assert (reading.memory_bytes_used, reading.utilisation, reading.temperature_c, reading.power_w) == (
        2 * GIB,
        0.3,
        61,
        120,
    )
    assert [process.name for process in reading.processes] == ["foreign (simulated)"]
    assert (last.memory_bytes_used, last.utilisation, last.processes) == (0, None, ())


def test_the_example_in_the_documentation_is_true(tmp_path: Path) -> None:
    from fleetmind.node import simulated

    assert simulated.__doc__ is not None
    example = simulated.__doc__.split("::\n\n")[1].split("\n\nWhatever")[0]
    devices = load(tmp_path, example).find()
    assert len(devices) == 7


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("devices:\n  - name: a\n    memory: 11 parsecs\n", 3, "11 parsecs"),
        ("devices:\n  - name: a\n", 2, "needs a memory"),
        ("devices:\n  - memory: 1GiB\n", 2, "needs a name"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    vram: 2\n", 4, "unknown entry 'vram'"),
        ("devices:\n  - name: a\n    name: b\n    memory: 1GiB\n", 3, "twice"),
        ("devices:\n  - {name: a, memory: 1GiB}\n  - {name: a, memory: 1GiB}\n", 3, "second device named 'a'"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    count: 0\n", 4, "whole number from 1"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    count: 99999999999999999999\n", 4, "whole number"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    kind: tpu\n", 4, "'tpu' is no kind"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    utilisation: .nan\n", 4, "utilisation"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    utilisation: 2\n", 4, "from 0 to 1"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    foreign_memory: 2GiB\n", 4, "more than memory"),
        ("devices:\n  - name: a\n    memory: [1]\n", 3, "memory"),
        ("devices:\n  - name: ../a\n    memory: 1GiB\n", 2, "no name"),
        ("devices:\n  - name: a\n    memory: 9999999999TiB\n", 3, "more than a device can have"),
        ("devices:\n  - name: a\n    memory: 1GiB\n    labels: [1]\n", 4, "labels"),
        ("devices:\n  - seven\n", 2, "expected entries like name"),
        ("cards: []\n", 1, "unknown entry 'cards'"),
        ("devices:\n  - name: a\n   memory: 1\n", 3, ""),
        ("devices: [}\n", 1, ""),
        ("devices: &a [*a]\n", 1, "expected entries"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text)
    assert f"devices.yaml, line {line}:" in caught.value.message
    assert what in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"devices:\n",
        b"devices: []\n",
        b"42",
        b"\xff\xfe\x00",
        b"\x00",
        b"[" * 60_000,
        b"- " * 30_000,
        b"x" * 100_000,
        b"!!python/object/apply:os.system ['true']",
        b"devices:\n  - {name: a, memory: 1GiB, labels: !!python/object/apply:os.system ['true']}",
        b"devices:\n  - {name: a, memory: 1GiB, count: 4096}\n  - {name: b, memory: 1GiB}\n",
    ],
    ids=range(12),
)
def test_a_hostile_file_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ConfigurationError):
        load(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        SimulatedDevices(tmp_path / "nowhere.yaml", SystemClock())
