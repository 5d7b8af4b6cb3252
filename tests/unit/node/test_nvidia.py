"""Cards, on a recording: what the driver does not say is None, never an exception and never zero."""

import os

import pytest

from fleetmind.core.clock import SystemClock
from fleetmind.core.types import GIB, MIB
from fleetmind.node.nvidia import NvidiaCards, NvmlFault, PyNvml
from fleetmind.node.protocol import DeviceKind
from fleetmind.testing.nvml import RecordedCard, RecordedNvml


def cards(*recorded: RecordedCard) -> NvidiaCards:
    found = NvidiaCards(SystemClock(), RecordedNvml(list(recorded)))
    found.find()
    return found


def test_cards_are_known_by_their_uuid() -> None:
    first, second = NvidiaCards(SystemClock(), RecordedNvml([RecordedCard("GPU-a"), RecordedCard("GPU-b")])).find()
    assert (first.id, second.id, second.index) == ("GPU-a", "GPU-b", 1)
    assert first.kind is DeviceKind.CUDA
    assert first.memory_bytes_total == 11 * GIB
    assert first.labels == {"compute_capability": "7.5"}


def test_no_driver_is_no_cards() -> None:
    without = NvidiaCards(SystemClock(), RecordedNvml([RecordedCard("GPU-a")], NvmlFault("Driver Not Loaded")))
    assert without.find() == ()
    assert without.read() == ()


def test_the_real_library_is_no_cards_or_some_but_never_an_exception() -> None:
    real = NvidiaCards(SystemClock(), PyNvml())
    assert len(real.read()) <= len(real.find())


@pytest.mark.parametrize("question", ["utilisation", "temperature_c", "power_w"])
def test_one_failing_question_is_none_and_a_fault_and_the_others_are_there(question: str) -> None:
    card = RecordedCard("GPU-a", utilisation=0.5)
    found = cards(card)
    card.faults[question] = NvmlFault("GPU is lost")
    (reading,) = found.read()
    assert getattr(reading, question) is None
    assert reading.fault is not None
    assert "GPU is lost" in reading.fault
    others = {"utilisation": 0.5, "temperature_c": 41.0, "power_w": 21.5}
    del others[question]
    assert {name: getattr(reading, name) for name in others} == others
    card.faults.clear()
    assert found.read()[0].fault is None


def test_what_a_card_cannot_tell_is_no_fault() -> None:
    card = RecordedCard("GPU-a", faults={"power_w": NvmlFault("Not Supported", is_unsupported=True)})
    (reading,) = cards(card).read()
    assert reading.power_w is None
    assert reading.fault is None


def test_memory_that_cannot_be_read_keeps_its_last_value_with_a_fault() -> None:
    card = RecordedCard("GPU-a", memory=(11 * GIB, 5 * GIB))
    found = cards(card)
    found.read()
    card.faults["memory"] = NvmlFault("GPU is lost")
    (reading,) = found.read()
    assert reading.memory_bytes_used == 5 * GIB
    assert reading.fault == "memory: GPU is lost"


def test_a_card_without_a_name_or_memory_is_left_out() -> None:
    broken = RecordedCard("GPU-b", faults={"memory": NvmlFault("unknown")})
    assert [
        device.id for device in NvidiaCards(SystemClock(), RecordedNvml([broken, RecordedCard("GPU-a")])).find()
    ] == ["GPU-a"]


def test_processes_are_named() -> None:
    card = RecordedCard("GPU-a", processes=[(os.getpid(), 700 * MIB), (2**22 + 1, None)])
    mine, gone = cards(card).read()[0].processes
    assert "py" in mine.name
    assert mine.memory_bytes == 700 * MIB
    assert (gone.name, gone.memory_bytes) == ("?", 0)
