import asyncio
from collections.abc import Sequence

from fleetmind.core.errors import StoreError
from fleetmind.core.telemetry import Metrics
from fleetmind.gateway.accounting import BATCH_ROWS_MAX, ROWS_MAX, Accounting
from fleetmind.store.usage import UsageRow


def row(number: int) -> UsageRow:
    return UsageRow(f"c{number}", "k", "m", "r", "chat/completions", "ok", 3, 4, 0.0, 0.1, 0.2, 1.0, False)


class Store:
    """Keeps what is written; refuses while ``is_full``; a write waits for ``gate``."""

    def __init__(self) -> None:
        self.rows: list[UsageRow] = []
        self.is_full = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, rows: Sequence[UsageRow]) -> None:
        await self.gate.wait()
        if self.is_full:
            raise StoreError("disk full")
        self.rows += rows


async def test_rows_are_written_once_and_in_order() -> None:
    store, metrics = Store(), Metrics()
    accounting = Accounting(store.write, metrics=metrics)
    for number in range(BATCH_ROWS_MAX + 1):
        accounting.settle(row(number))
    await accounting.flush()
    await accounting.flush()
    assert [one.call_id for one in store.rows] == [f"c{n}" for n in range(BATCH_ROWS_MAX + 1)]
    assert metrics.registry.get_sample_value("fleetmind_tokens_total", {"model": "m", "kind": "completion"}) == 4.0 * (
        BATCH_ROWS_MAX + 1
    )


async def test_what_the_database_refuses_is_written_when_it_has_room() -> None:
    store = Store()
    accounting = Accounting(store.write, metrics=Metrics())
    accounting.settle(row(1))
    store.is_full = True
    await accounting.flush()
    store.is_full = False
    accounting.settle(row(2))
    await accounting.flush()
    assert [one.call_id for one in store.rows] == ["c1", "c2"]


async def test_a_batch_under_way_when_the_server_stops_is_written_once() -> None:
    store = Store()
    accounting = Accounting(store.write, metrics=Metrics())
    accounting.settle(row(1))
    store.gate.clear()
    flushing = asyncio.ensure_future(accounting.flush())
    await asyncio.sleep(0)
    flushing.cancel()
    store.gate.set()
    await asyncio.wait({flushing})
    await accounting.flush()
    assert [one.call_id for one in store.rows] == ["c1"]


async def test_rows_held_are_bounded_and_those_dropped_are_counted() -> None:
    metrics = Metrics()
    accounting = Accounting(Store().write, metrics=metrics)
    for number in range(ROWS_MAX + 5):
        accounting.settle(row(number))
    assert metrics.registry.get_sample_value("fleetmind_usage_dropped_total") == 5.0
