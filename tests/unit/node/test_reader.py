"""The reader of all devices: a driver that breaks or hangs is a fault text, not a hang."""

import threading
from pathlib import Path

import pytest

from fleetmind.core.clock import SystemClock
from fleetmind.core.errors import ConfigurationError
from fleetmind.core.settings import NodeSettings
from fleetmind.core.types import DeviceId
from fleetmind.node.devices import DeviceReader, open_devices
from fleetmind.node.protocol import Device, DeviceKind, DeviceReading


class Hanging:
    """A source whose driver answers only when told to."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.asked = 0

    def find(self) -> tuple[Device, ...]:
        return (Device(DeviceId("GPU-a"), DeviceKind.CUDA, "a card", 100),)

    def read(self) -> tuple[DeviceReading, ...]:
        self.asked += 1
        self.released.wait(30)
        return (DeviceReading(DeviceId("GPU-a"), 1.0, 40),)


async def test_a_driver_that_hangs_is_a_fault_and_collects_no_threads() -> None:
    source = Hanging()
    reader = DeviceReader([source], SystemClock(), read_s_max=0.05)
    await reader.find()
    for _ in range(3):
        (reading,) = await reader.read()
        assert reading.fault is not None
        assert "has not answered" in reading.fault
    assert source.asked == 1
    source.released.set()
    while (reading := (await reader.read())[0]).fault:
        pass
    assert reading.memory_bytes_used == 40


async def test_real_devices_unless_a_file_is_named(tmp_path: Path) -> None:
    reader = open_devices(NodeSettings(), SystemClock())
    assert "cpu" in {device.kind for device in await reader.find()}
    path = tmp_path / "devices.yaml"
    path.write_text("devices: [{name: card, memory: 11GiB}]")
    simulated = open_devices(NodeSettings(devices_file=str(path)), SystemClock())
    assert [device.id for device in await simulated.find()] == ["card"]
    with pytest.raises(ConfigurationError):
        open_devices(NodeSettings(devices_file=str(tmp_path / "none")), SystemClock())
