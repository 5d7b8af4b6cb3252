"""Every source of devices through the same checks; NVIDIA cards on a recording, and for real where there are some."""

from pathlib import Path

import pytest

from fleetmind.core.clock import SystemClock
from fleetmind.node.nvidia import NvidiaCards
from fleetmind.node.processor import Processor
from fleetmind.node.simulated import SimulatedDevices
from fleetmind.testing.contracts_engine import check_devices
from fleetmind.testing.nvml import RecordedCard, RecordedNvml


def test_the_processor_keeps_the_contract() -> None:
    check_devices(Processor(SystemClock()))


def test_recorded_cards_keep_the_contract() -> None:
    check_devices(NvidiaCards(SystemClock(), RecordedNvml([RecordedCard(f"GPU-{index}") for index in range(7)])))


def test_simulated_devices_keep_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text("devices:\n  - {name: card, memory: 11GiB, count: 7}\n  - {name: box, kind: cpu, memory: 64GiB}\n")
    check_devices(SimulatedDevices(path, SystemClock()), is_simulated=True)


@pytest.mark.real
def test_real_cards_keep_the_contract() -> None:
    cards = NvidiaCards(SystemClock())
    if not cards.find():
        pytest.skip("no NVIDIA card here")
    check_devices(cards)
