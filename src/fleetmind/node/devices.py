"""The devices of this machine and what they look like now.

Composes sources: the processor, NVIDIA cards, or the simulated devices of a file instead of both. Decides nothing and
changes nothing. Invariant: reading never raises and never hangs a caller's loop; what a device does not say is None,
and a source that broke leaves the last reading with a fault.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fleetmind.core.clock import Clock
from fleetmind.core.settings import NodeSettings
from fleetmind.core.types import DeviceId
from fleetmind.node.nvidia import NvidiaCards
from fleetmind.node.processor import Processor
from fleetmind.node.protocol import Device, DeviceReading
from fleetmind.node.simulated import SimulatedDevices

READ_S_MAX = 5.0


class DeviceSource(Protocol):
    """One way to find devices. Both methods may block; neither raises for what the system does."""

    def find(self) -> tuple[Device, ...]:
        """The devices there are; none where there is no driver."""
        ...

    def read(self) -> tuple[DeviceReading, ...]:
        """How they look now."""
        ...


def open_devices(settings: NodeSettings, clock: Clock) -> "DeviceReader":
    """The reader that the settings ask for: this machine's devices, or the simulated ones of ``devices_file`` instead.

    Raises ConfigurationError when that file can't be used.
    """
    if settings.devices_file:
        return DeviceReader([SimulatedDevices(Path(settings.devices_file), clock)], clock)
    return DeviceReader([Processor(clock), NvidiaCards(clock)], clock)


class DeviceReader:
    """All devices of this machine."""

    def __init__(self, sources: Sequence[DeviceSource], clock: Clock, *, read_s_max: float = READ_S_MAX) -> None:
        self._sources = sources
        self._clock = clock
        self._read_s_max = read_s_max
        self._devices: tuple[Device, ...] = ()
        self._readings: dict[DeviceId, DeviceReading] = {}
        self._reading: asyncio.Task[list[tuple[DeviceReading, ...]]] | None = None

    async def find(self) -> tuple[Device, ...]:
        """Look for devices; to be awaited once before the others."""
        found = await asyncio.gather(*(asyncio.to_thread(source.find) for source in self._sources))
        self._devices = tuple(device for devices in found for device in devices)
        return self._devices

    def devices(self) -> tuple[Device, ...]:
        """The devices that were found."""
        return self._devices

    async def read(self) -> tuple[DeviceReading, ...]:
        """A reading of each device, in their order. One that does not answer in time keeps its last, with a fault."""
        if self._reading is None:  # a driver that hangs must not collect threads
            self._reading = asyncio.create_task(self._read_sources(), name="device reading")
        fault = ""
        done, _ = await asyncio.wait({self._reading}, timeout=self._read_s_max)
        if done:
            for reading in (reading for readings in self._reading.result() for reading in readings):
                self._readings[reading.device_id] = reading
            self._reading = None
        else:
            fault = f"the driver has not answered for {self._read_s_max:g} s"
        return tuple(self._last(device, fault) for device in self._devices)

    async def _read_sources(self) -> list[tuple[DeviceReading, ...]]:
        return await asyncio.gather(*(asyncio.to_thread(source.read) for source in self._sources))

    def _last(self, device: Device, fault: str) -> DeviceReading:
        last = self._readings.get(device.id)
        if last is None:
            return DeviceReading(device.id, self._clock.now_s(), 0, fault=fault or "was never read")
        return replace(last, fault=fault) if fault else last
