"""What every call used: counted at once, written to the database in batches.

Nothing here ever makes a client wait. A batch that the database refuses is tried again; the number of rows held is
bounded, and rows past the bound are dropped and counted, so that a full disk can't fill the memory. Killing the server
loses at most the rows of one interval: usage is not acknowledged to anybody before it is written.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from fleetmind.core.errors import StoreError
from fleetmind.core.telemetry import Metrics, log
from fleetmind.store.usage import UsageRow

ROWS_MAX = 100_000
BATCH_ROWS_MAX = 5_000

_log = log(__name__)


class Accounting:
    """Counts calls; ``flush``, called every second or so, writes them with ``write``, which may raise StoreError."""

    def __init__(
        self,
        write: Callable[[Sequence[UsageRow]], Awaitable[None]],
        *,
        metrics: Metrics,
    ) -> None:
        self._write = write
        self._metrics = metrics
        self._rows: deque[UsageRow] = deque()
        self._counters: dict[tuple[str, str], _Counters] = {}

    def settle(self, row: UsageRow) -> None:
        """Count a finished call and keep its row for the next batch."""
        counters = self._counters.get((row.model, row.status))
        if counters is None:
            counters = self._counters[row.model, row.status] = _Counters(self._metrics, row.model, row.status)
        counters.count(row)
        if len(self._rows) >= ROWS_MAX:
            self._metrics.usage_dropped_total.inc()
            return
        self._rows.append(row)

    def push(self) -> None:
        """Bring the counters of the registry to the present; done before they are read."""
        for counters in self._counters.values():
            counters.push()

    async def flush(self) -> None:
        """Write all rows held. A batch that can't be written stays for the next time."""
        self.push()
        while self._rows:
            batch = [self._rows[i] for i in range(min(len(self._rows), BATCH_ROWS_MAX))]
            writing = asyncio.ensure_future(self._write(batch))
            try:
                # A batch under way when the loop is stopped is waited for, so that it is never written twice.
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing
                self._drop(len(batch))
                raise
            except StoreError as error:
                _log.error("usage was not written", rows=len(self._rows), error=error.message)
                return
            self._drop(len(batch))

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._rows.popleft()


class _Counters:
    """The metrics of one model and status. What can be added up is, and reaches the registry with ``push``."""

    def __init__(self, metrics: Metrics, model: str, status: str) -> None:
        self._calls = metrics.calls_total.labels(model, status)
        self._prompt = metrics.tokens_total.labels(model, "prompt")
        self._completion = metrics.tokens_total.labels(model, "completion")
        self._seconds = metrics.call_seconds.labels(model)
        self._ttft = metrics.ttft_seconds.labels(model)
        self._counts = [0, 0, 0]

    def count(self, row: UsageRow) -> None:
        counts = self._counts
        counts[0] += 1
        counts[1] += row.prompt_tokens
        counts[2] += row.completion_tokens
        self._seconds.observe(row.duration_s)
        if row.ttft_s is not None:
            self._ttft.observe(row.ttft_s)

    def push(self) -> None:
        for counter, count in zip((self._calls, self._prompt, self._completion), self._counts, strict=True):
            if count:
                counter.inc(count)
        self._counts = [0, 0, 0]
