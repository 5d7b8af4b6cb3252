"""A whole service in a process of its own: for limits, kills and sizes that must not be the test's."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from tests.flow.service import QUICK, Service

from fleetmind.app import Started

PROGRAM = """
import asyncio, dataclasses, json, sys
from pathlib import Path

import uvloop

from fleetmind.app import serve
from fleetmind.core.config import load

def tell(started):
    print(json.dumps(dataclasses.asdict(started), default=str), flush=True)

home, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
uvloop.run(serve(home, load(home, environ={}, flags=flags), on_ready=tell))
"""


class Child(Service):
    """A service in another process, which is ``pid``."""

    def __init__(self, home: Path, started: Started, session: aiohttp.ClientSession, pid: int) -> None:
        super().__init__(home, started, session)
        self.pid = pid


@asynccontextmanager
async def running_apart(home: Path, **flags: str) -> AsyncIterator[Child]:
    """A service on ``home`` in a child process; stopped in order at the end."""
    wanted = json.dumps(QUICK | {name.replace("__", "."): value for name, value in flags.items()})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(home), wanted, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            line = await process.stdout.readline()
        assert line, f"the service ended with {await process.wait()} before it was ready"
        started = json.loads(line)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield Child(home, Started(**started | {"token_file": Path(started["token_file"])}), session, process.pid)
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.wait()
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
