"""The processor and its memory as a device, through psutil.

The memory that counts is what this process may use: a container's limit when it is below the machine's. Invariant: the
id is the same after every restart, and does not give the machine's id away.
"""

import hashlib
import math
import os
import platform
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fleetmind.core.clock import Clock
from fleetmind.core.types import DeviceId
from fleetmind.node.protocol import Device, DeviceKind, DeviceProcess, DeviceReading

HOLDERS_SHOWN = 8
HOLDERS_INTERVAL_S = 15.0
"""How often the largest processes are looked up: that reads every process of the machine."""


class Processor:
    """The one processor of this machine. ``root`` is where /proc, /sys and /etc are found."""

    def __init__(self, clock: Clock, root: Path = Path("/")) -> None:
        self._clock = clock
        self._root = root
        self._id = DeviceId(f"cpu-{_machine_digest(root)}")
        self._holders: tuple[DeviceProcess, ...] = ()
        self._holders_due_s = 0.0

    def find(self) -> tuple[Device, ...]:
        """The processor."""
        limit = cgroup_memory(self._root).limit_bytes
        total = psutil.virtual_memory().total
        device = Device(
            id=self._id,
            kind=DeviceKind.CPU,
            name=_name(self._root),
            memory_bytes_total=min(total, limit or total),
            cores=usable_cores(self._root),
            labels={"machine": platform.machine(), "system": platform.system()},
        )
        psutil.cpu_percent()  # the first call only sets the mark to measure from
        return (device,)

    def read(self) -> tuple[DeviceReading, ...]:
        """Memory, load and temperature now."""
        memory, group = psutil.virtual_memory(), cgroup_memory(self._root)
        inside = group.limit_bytes is not None and group.limit_bytes < memory.total
        used = group.used_bytes if inside and group.used_bytes is not None else memory.total - memory.available
        reading = DeviceReading(
            device_id=self._id,
            at_s=self._clock.now_s(),
            memory_bytes_used=used,
            utilisation=psutil.cpu_percent() / 100,
            temperature_c=_temperature_c(),
            processes=self._largest(),
        )
        return (reading,)

    def _largest(self) -> tuple[DeviceProcess, ...]:
        if self._clock.monotonic_s() >= self._holders_due_s:
            self._holders_due_s = self._clock.monotonic_s() + HOLDERS_INTERVAL_S
            self._holders = largest_processes()
        return self._holders


class CgroupMemory:
    """The limit of this process's control group and what the group uses; None where there is none."""

    def __init__(self, limit_bytes: int | None = None, used_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = used_bytes


def cgroup_memory(root: Path = Path("/")) -> CgroupMemory:
    """The tightest memory limit on the way from this process's control group to the root, version 1 or 2.

    What a group uses leaves out the file cache that the kernel can drop, as ``docker stats`` does.
    """
    tightest = CgroupMemory()
    for mount, path, limit_name, used_name, cache_name in _cgroups(root):
        for folder in (mount / path, *(mount / path).parents):
            if folder == mount.parent:
                break
            limit = _number(folder / limit_name)
            if limit is not None and limit < (tightest.limit_bytes or 1 << 60):
                used = _number(folder / used_name)
                cache = _statistic(folder / "memory.stat", cache_name)
                tightest = CgroupMemory(limit, None if used is None else max(0, used - cache))
    return tightest


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process can compute on: no more than it may use, and real ones, not threads of one core."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    cores = min(logical, psutil.cpu_count(logical=False) or logical)
    with suppress(OSError, ValueError):
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def largest_processes() -> tuple[DeviceProcess, ...]:
    """The processes that hold most memory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found.append((process.memory_info().rss, process.pid, process))
    holders = []
    for size, pid, process in sorted(found, key=lambda entry: entry[:2], reverse=True)[:HOLDERS_SHOWN]:
        with suppress(psutil.Error):
            holders.append(DeviceProcess(pid, process.name(), size))
    return tuple(holders)


def _cgroups(root: Path) -> list[tuple[Path, str, str, str, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    mount = root / "sys/fs/cgroup"
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found.append((mount, path.lstrip("/"), "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found.append((mount / "memory", path.lstrip("/"), *names))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None


def _statistic(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _machine_digest(root: Path) -> str:
    for name in ("etc/machine-id", "var/lib/dbus/machine-id"):
        with suppress(OSError, UnicodeDecodeError):
            machine = (root / name).read_text(encoding="ascii").strip()
            if machine:
                return hashlib.sha256(machine.encode()).hexdigest()[:8]
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _name(root: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _temperature_c() -> float | None:
    sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    for name in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
        readings = [entry.current for entry in sensors.get(name, []) if entry.current is not None]
        if readings:
            return float(max(readings))
    return None
