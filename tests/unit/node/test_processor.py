"""The processor's memory is what this process may use, and its id gives nothing away."""

from pathlib import Path

import psutil
import pytest

from fleetmind.core.clock import SystemClock
from fleetmind.core.types import GIB, MIB
from fleetmind.node.processor import Processor, cgroup_memory, largest_processes, usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_limit_of_cgroups_version_2_is_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/outer/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
            "sys/fs/cgroup/memory.max": f"{3 * GIB}\n",
        },
    )
    memory = cgroup_memory(root)
    assert (memory.limit_bytes, memory.used_bytes) == (2 * GIB, GIB - 100 * MIB)
    (device,) = Processor(SystemClock(), root).find()
    assert device.memory_bytes_total == min(2 * GIB, psutil.virtual_memory().total)


def test_a_limit_of_cgroups_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{GIB // 2}\n",
            "sys/fs/cgroup/memory/docker/abc/memory.stat": "total_inactive_file 0\n",
        },
    )
    memory = cgroup_memory(root)
    assert (memory.limit_bytes, memory.used_bytes) == (GIB, GIB // 2)
    reading = Processor(SystemClock(), root)
    reading.find()
    assert reading.read()[0].memory_bytes_used == GIB // 2


@pytest.mark.parametrize(
    "limit", ["9223372036854771712", "max", "nonsense", ""], ids=["v1 unlimited", "max", "nonsense", "empty"]
)
def test_no_limit_is_the_machine(tmp_path: Path, limit: str) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": limit})
    assert cgroup_memory(root).limit_bytes is None
    (device,) = Processor(SystemClock(), root).find()
    assert device.memory_bytes_total == psutil.virtual_memory().total


def test_a_quota_bounds_the_cores(tmp_path: Path) -> None:
    assert usable_cores(write(tmp_path, {"sys/fs/cgroup/cpu.max": "50000 100000\n"})) == 1
    assert usable_cores(write(tmp_path, {"sys/fs/cgroup/cpu.max": "max 100000\n"})) >= 1
    assert usable_cores(tmp_path / "nothing") >= 1


def test_the_id_is_stable_and_hides_the_machine_id(tmp_path: Path) -> None:
    machine = "0123456789abcdef0123456789abcdef"
    root = write(tmp_path, {"etc/machine-id": machine + "\n"})
    first, second = (Processor(SystemClock(), root).find()[0].id for _ in range(2))
    assert first == second
    assert len(first) == len("cpu-") + 8
    assert first.removeprefix("cpu-") not in machine
    other = write(tmp_path / "other", {"etc/machine-id": machine[::-1]})
    assert Processor(SystemClock(), other).find()[0].id != first


def test_the_largest_processes_come_first() -> None:
    sizes = [process.memory_bytes for process in largest_processes()]
    assert sizes == sorted(sizes, reverse=True)
    assert 1 <= len(sizes) <= 8
