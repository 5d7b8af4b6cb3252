"""Asks a program what it can do: runs it once and reads what it prints, within bounds of time and size.

Believes nothing and starts no server. Invariant: nothing of the asked program is left when the answer is there.
"""

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress

ASK_S_MAX = 10.0
OUTPUT_BYTES_MAX = 1024**2
_PASSED = ("PATH", "HOME", "LD_LIBRARY_PATH")


async def output_of(environ: Mapping[str, str], *argv: str) -> str:
    """What ``argv`` prints, its errors too; empty when it can't be run. It sees little of ``environ``: no secret."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={name: environ[name] for name in _PASSED if name in environ},
            start_new_session=True,
        )
    except OSError:
        return ""
    assert process.stdout is not None
    text = b""
    try:
        async with asyncio.timeout(ASK_S_MAX):
            while len(text) < OUTPUT_BYTES_MAX and (piece := await process.stdout.read(65536)):
                text += piece
    except TimeoutError:
        pass
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        while await process.stdout.read(65536):  # asyncio sees the end only once the pipe is empty
            pass
        await process.wait()
    return text.decode("utf-8", errors="replace")
