"""NVIDIA cards as devices, through the driver's own library (NVML), by UUID.

The few calls used are the Protocol below, so that everything here runs on a recording without a card. Invariant: a
missing driver is no cards, a failing question is a None and a fault text; neither is ever an exception.

Not covered: cards split into instances (MIG) show as the whole card.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import psutil

from fleetmind.core.clock import Clock
from fleetmind.core.types import DeviceId
from fleetmind.node.protocol import Device, DeviceKind, DeviceProcess, DeviceReading

T = TypeVar("T")


class NvmlFault(Exception):
    """A question the driver did not answer. ``is_unsupported`` when this card never will."""

    def __init__(self, message: str, *, is_unsupported: bool = False) -> None:
        super().__init__(message)
        self.is_unsupported = is_unsupported


class Nvml(Protocol):
    """The calls of NVML that we use. Each may raise NvmlFault and nothing else; a card is any value."""

    def open(self) -> None: ...
    def cards(self) -> list[Any]: ...
    def uuid(self, card: Any) -> str: ...
    def name(self, card: Any) -> str: ...
    def compute_capability(self, card: Any) -> str: ...
    def memory(self, card: Any) -> tuple[int, int]:
        """Total and used, in bytes."""
        ...

    def utilisation(self, card: Any) -> float:
        """From 0 to 1."""
        ...

    def temperature_c(self, card: Any) -> float: ...
    def power_w(self, card: Any) -> float: ...
    def processes(self, card: Any) -> list[tuple[int, int | None]]:
        """Pid and bytes held, None where the driver may not say (WSL2)."""
        ...


class PyNvml:
    """The driver's library itself."""

    def open(self) -> None:
        import pynvml  # only where somebody asks for cards

        self._nvml = pynvml
        self._call(pynvml.nvmlInit)

    def cards(self) -> list[Any]:
        handle = self._nvml.nvmlDeviceGetHandleByIndex
        return [self._call(handle, index) for index in range(self._call(self._nvml.nvmlDeviceGetCount))]

    def uuid(self, card: Any) -> str:
        return _text(self._call(self._nvml.nvmlDeviceGetUUID, card))

    def name(self, card: Any) -> str:
        return _text(self._call(self._nvml.nvmlDeviceGetName, card))

    def compute_capability(self, card: Any) -> str:
        return ".".join(str(part) for part in self._call(self._nvml.nvmlDeviceGetCudaComputeCapability, card))

    def memory(self, card: Any) -> tuple[int, int]:
        memory = self._call(self._nvml.nvmlDeviceGetMemoryInfo, card)
        return int(memory.total), int(memory.used)

    def utilisation(self, card: Any) -> float:
        return float(self._call(self._nvml.nvmlDeviceGetUtilizationRates, card).gpu) / 100

    def temperature_c(self, card: Any) -> float:
        return float(self._call(self._nvml.nvmlDeviceGetTemperature, card, self._nvml.NVML_TEMPERATURE_GPU))

    def power_w(self, card: Any) -> float:
        return float(self._call(self._nvml.nvmlDeviceGetPowerUsage, card)) / 1000

    def processes(self, card: Any) -> list[tuple[int, int | None]]:
        computing = self._call(self._nvml.nvmlDeviceGetComputeRunningProcesses, card)
        with suppress(NvmlFault):  # cards without a display say no
            computing = computing + self._call(self._nvml.nvmlDeviceGetGraphicsRunningProcesses, card)
        return list({process.pid: (int(process.pid), process.usedGpuMemory) for process in computing}.values())

    def _call(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError as fault:
            is_unsupported = fault.value in (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_NO_PERMISSION)
            raise NvmlFault(str(fault), is_unsupported=is_unsupported) from fault


@dataclass(slots=True)
class _Card:
    """A card that was found, and the last memory it showed."""

    handle: Any
    device: Device
    memory_bytes_used: int = 0
    faults: list[str] = field(default_factory=list)

    def ask(self, what: str, question: Callable[[Any], T]) -> T | None:
        """The answer, or None and a noted fault."""
        try:
            return question(self.handle)
        except NvmlFault as fault:
            if not fault.is_unsupported:
                self.faults.append(f"{what}: {fault}")
            return None


class NvidiaCards:
    """The NVIDIA cards of this machine."""

    def __init__(self, clock: Clock, nvml: Nvml | None = None) -> None:
        self._clock = clock
        self._nvml = nvml or PyNvml()
        self._cards: list[_Card] = []

    def find(self) -> tuple[Device, ...]:
        """The cards; none without a driver. One without UUID or memory cannot be used and is left out."""
        try:
            self._nvml.open()
            handles = self._nvml.cards()
        except NvmlFault:
            return ()
        self._cards = [card for index, handle in enumerate(handles) if (card := self._describe(handle, index))]
        return tuple(card.device for card in self._cards)

    def read(self) -> tuple[DeviceReading, ...]:
        """How the cards look now."""
        return tuple(self._read(card) for card in self._cards)

    def _describe(self, handle: Any, index: int) -> _Card | None:
        labels = {}
        with suppress(NvmlFault):
            labels["compute_capability"] = self._nvml.compute_capability(handle)
        try:
            total, used = self._nvml.memory(handle)
            device = Device(
                id=DeviceId(self._nvml.uuid(handle)),
                kind=DeviceKind.CUDA,
                name=self._nvml.name(handle),
                memory_bytes_total=total,
                index=index,
                labels=labels,
            )
        except NvmlFault:
            return None
        return _Card(handle, device, used)

    def _read(self, card: _Card) -> DeviceReading:
        card.faults.clear()
        memory = card.ask("memory", self._nvml.memory)
        if memory is None and not card.faults:
            card.faults.append("memory: not supported")
        card.memory_bytes_used = memory[1] if memory else card.memory_bytes_used
        return DeviceReading(
            device_id=card.device.id,
            at_s=self._clock.now_s(),
            memory_bytes_used=card.memory_bytes_used,
            utilisation=card.ask("utilisation", self._nvml.utilisation),
            temperature_c=card.ask("temperature", self._nvml.temperature_c),
            power_w=card.ask("power", self._nvml.power_w),
            processes=tuple(
                DeviceProcess(pid, _process_name(pid), size or 0)
                for pid, size in card.ask("processes", self._nvml.processes) or []
            ),
            fault="; ".join(card.faults) or None,
        )


def _process_name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:  # in another container, or just gone
        return "?"


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
