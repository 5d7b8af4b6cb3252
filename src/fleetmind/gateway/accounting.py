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

    def settle(self, row: UsageRow) -> None:
        """Count a finished call and keep its row for the next batch."""
        self._metrics.calls.add(
            row.model,
            row.status,
            prompt_tokens=row.prompt_tokens,
            completion_tokens=row.completion_tokens,
            seconds=row.duration_s,
            ttft_s=row.ttft_s,
        )
        if len(self._rows) >= ROWS_MAX:
            self._metrics.usage_dropped_total.inc()
            return
        self._rows.append(row)

    async def flush(self) -> None:
        """Write all rows held. A batch that can't be written stays for the next time."""
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
