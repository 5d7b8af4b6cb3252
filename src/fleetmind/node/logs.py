"""The log of one replica: what its process printed, bounded on disk and readable from the end.

A file and its predecessor (``….log.1``), each of at most half the bound, so the newest half is always there whole. The
writer is paced: an engine that floods its log is slowed down by the full pipe instead of slowing down the server.
Invariant: never more than ``bytes_max`` on disk.
"""

import asyncio
import os
from pathlib import Path

CHUNK_BYTES = 65536
PACE_BYTES_PER_S = 16 * 1024**2
"""What one engine may log per second; ten thousand times what a healthy one does."""
TAIL_BYTES_MAX = 512 * 1024
"""How far back a tail looks."""


class ReplicaLog:
    """One replica's log file. Not shared between writers."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self.path = path
        self.bytes_written = 0
        self._bytes_max = bytes_max
        self._bytes_in_file = path.stat().st_size if path.exists() else 0

    @property
    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def write(self, text: bytes) -> None:
        """Append; blocking. A write the disk refuses is dropped: a full disk must not stop tokens."""
        half = self._bytes_max // 2
        text = text[-half:]
        try:
            if self._bytes_in_file + len(text) > half and self._bytes_in_file:
                self.path.replace(self._older)
                self._bytes_in_file = 0
            with open(self.path, "ab", opener=_private) as file:
                file.write(text)
            self._bytes_in_file += len(text)
        except OSError:
            pass
        self.bytes_written += len(text)

    async def pump(self, stream: asyncio.StreamReader) -> None:
        """Write everything ``stream`` brings until it ends."""
        loop = asyncio.get_running_loop()
        while chunk := await stream.read(CHUNK_BYTES):
            started = loop.time()
            await asyncio.to_thread(self.write, chunk)
            ahead_s = len(chunk) / PACE_BYTES_PER_S - (loop.time() - started)
            if ahead_s > 0.001:  # a full chunk: back pressure through the pipe
                await asyncio.sleep(ahead_s)

    def tail(self, lines: int) -> list[str]:
        """The last ``lines`` lines, oldest first."""
        return read_tail(self.path, lines)


def read_tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of a log and its predecessor, oldest first; what isn't there is no lines. A quick,
    bounded read."""
    kept = b""
    for file in (path, path.with_name(path.name + ".1")):
        wanted = TAIL_BYTES_MAX - len(kept)
        if kept.count(b"\n") > lines or wanted <= 0:
            break
        kept = _end_of(file, wanted) + kept
    return kept.decode("utf-8", errors="replace").splitlines()[-lines:] if lines > 0 else []


def _end_of(file: Path, size_bytes: int) -> bytes:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - size_bytes))
            return opened.read(size_bytes)
    except FileNotFoundError:
        return b""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
