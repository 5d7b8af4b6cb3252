"""Killed with SIGKILL, a server takes its engines along: those of our own, and programs that know nothing of us."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleetmind.node.ledger import process_identity

SERVER = """
import asyncio, os, sys
from pathlib import Path
from fleetmind.node.engine import Command
from fleetmind.node.logs import ReplicaLog
from fleetmind.node.process import EngineProcess, ProcessBounds

OURS = "from fleetmind.node import lifeline; lifeline.hold(); print('up', flush=True); import signal; signal.pause()"

async def main(home):
    started = []
    for at, argv in enumerate([(sys.executable, "-c", OURS), ("sleep", "300")]):
        started.append(await EngineProcess.start(
            Command(argv=argv), directory=home / str(at), log=ReplicaLog(home / f"{at}.log", 1000),
            bounds=ProcessBounds(), environ=os.environ))
    while not (home / "0.log").exists():
        await asyncio.sleep(0.01)
    print([process.pid for process in started], flush=True)
    await asyncio.sleep(300)

if sys.argv[2] == "uvloop":
    import uvloop
    uvloop.run(main(Path(sys.argv[1])))
else:
    asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="pidfd and the parent-death signal")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_engines_end_with_a_killed_server(tmp_path: Path, loop: str) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path), loop], stdout=subprocess.PIPE)
    assert server.stdout is not None
    pids = json.loads(server.stdout.readline())
    watches = [os.pidfd_open(pid) for pid in pids]
    server.send_signal(signal.SIGKILL)
    server.communicate()
    for watch, pid in zip(watches, pids, strict=True):
        ended, _, _ = select.select([watch], [], [], 10)
        os.close(watch)
        assert ended, f"process {pid} outlived its server"
        assert process_identity(pid) is None
