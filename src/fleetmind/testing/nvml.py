"""A recording of NVIDIA's driver, for machines without one: answers as a card did, and can be made to fail.

The defaults are those of an idle GeForce RTX 2080 Ti. Invariant: raises NvmlFault where the driver would, nothing else.
"""

from dataclasses import dataclass, field
from typing import Any

from fleetmind.core.types import GIB
from fleetmind.node.nvidia import NvmlFault


@dataclass(slots=True)
class RecordedCard:
    """What a card answers; a question named in ``faults`` (by method) raises what stands there instead."""

    uuid: str
    name: str = "NVIDIA GeForce RTX 2080 Ti"
    compute_capability: str = "7.5"
    memory: tuple[int, int] = (11 * GIB, 300 * 1024**2)
    utilisation: float = 0.0
    temperature_c: float = 41.0
    power_w: float = 21.5
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    faults: dict[str, NvmlFault] = field(default_factory=dict)


class RecordedNvml:
    """The driver's library with these cards; with ``fault`` it can't be opened."""

    def __init__(self, cards: list[RecordedCard], fault: NvmlFault | None = None) -> None:
        self._cards = cards
        self._fault = fault

    def open(self) -> None:
        if self._fault is not None:
            raise self._fault

    def cards(self) -> list[Any]:
        return list(self._cards)

    def uuid(self, card: Any) -> str:
        return str(_ask(card, "uuid"))

    def name(self, card: Any) -> str:
        return str(_ask(card, "name"))

    def compute_capability(self, card: Any) -> str:
        return str(_ask(card, "compute_capability"))

    def memory(self, card: Any) -> tuple[int, int]:
        total, used = _ask(card, "memory")
        return total, used

    def utilisation(self, card: Any) -> float:
        return float(_ask(card, "utilisation"))

    def temperature_c(self, card: Any) -> float:
        return float(_ask(card, "temperature_c"))

    def power_w(self, card: Any) -> float:
        return float(_ask(card, "power_w"))

    def processes(self, card: Any) -> list[tuple[int, int | None]]:
        return list(_ask(card, "processes"))


def _ask(card: RecordedCard, question: str) -> Any:
    if question in card.faults:
        raise card.faults[question]
    return getattr(card, question)
