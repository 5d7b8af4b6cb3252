"""A process of ours is bounded, private, and ends with everything it started."""

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import pytest

from fleetmind.core.errors import EngineStartFailed
from fleetmind.node.engine import Command
from fleetmind.node.ledger import process_identity
from fleetmind.node.logs import ReplicaLog, read_tail
from fleetmind.node.process import EngineProcess, Exit, ProcessBounds

SECRET = "s3cr3t-of-somebody"


async def start(
    tmp_path: Path, code: str, *, bounds: ProcessBounds | None = None, command: Command | None = None
) -> EngineProcess:
    return await EngineProcess.start(
        command or Command(argv=(sys.executable, "-c", code)),
        directory=tmp_path / "own",
        log=ReplicaLog(tmp_path / "own.log", 1_000_000),
        bounds=bounds or ProcessBounds(),
        environ={"PATH": os.environ["PATH"], "OPENAI_API_KEY": SECRET, "LLAMA_ARG_HOST": "0.0.0.0", "LC_ALL": "C"},
    )


async def lines_of(tmp_path: Path, process: EngineProcess) -> list[str]:
    await process.wait()
    return read_tail(tmp_path / "own.log", 100)


async def first_line(tmp_path: Path) -> str:
    """The first line of the log, awaited."""
    async with asyncio.timeout(10):
        while not (lines := read_tail(tmp_path / "own.log", 10)):
            await asyncio.sleep(0.01)
    return lines[0]


async def test_input_output_and_exit_code(tmp_path: Path) -> None:
    process = await start(tmp_path, "import sys; print(sys.stdin.read()[::-1]); sys.exit('bad' and 7)")
    process.deliver(b"abc")
    assert (await process.wait()).words() == "exited with code 7"
    assert read_tail(tmp_path / "own.log", 9) == ["cba"]


async def test_the_bounds_hold_from_the_first_instruction(tmp_path: Path) -> None:
    code = (
        "import json, os, resource, signal, pathlib\n"
        "print(json.dumps([resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)[0],\n"
        "    int(pathlib.Path('/proc/self/oom_score_adj').read_text()), os.nice(0), os.getpgid(0) == os.getpid(),\n"
        "    os.getsid(0) == os.getpid(), os.umask(0), pathlib.Path.cwd().name,\n"
        "    signal.getsignal(signal.SIGINT) is not None]))"
    )
    bounds = ProcessBounds(files_max=64, oom_score=700, nice=3)
    seen = json.loads((await lines_of(tmp_path, await start(tmp_path, code, bounds=bounds)))[0])
    assert seen == [[0, 0], 64, 700, os.nice(0) + 3, True, True, 0o077, "own", True]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 64


async def test_the_environment_holds_no_secret_and_no_setting_of_an_engine(tmp_path: Path) -> None:
    process = await start(tmp_path, "import os; print('|'.join(f'{k}={v}' for k, v in os.environ.items()))")
    (line,) = await lines_of(tmp_path, process)
    assert SECRET not in line
    assert "LLAMA_ARG" not in line
    assert "LC_ALL=C" in line


async def test_files_are_private(tmp_path: Path) -> None:
    command = Command(
        argv=(sys.executable, "-c", "import os; print(open('key').read(), oct(os.stat('key').st_mode))"),
        files={"key": b"k"},
    )
    process = await start(tmp_path, "", command=command)
    assert await lines_of(tmp_path, process) == ["k 0o100600"]


async def test_a_program_that_is_not_there_says_so(tmp_path: Path) -> None:
    process = await start(tmp_path, "", command=Command(argv=("/no/such/engine",)))
    assert await process.wait() == Exit(127)
    assert read_tail(tmp_path / "own.log", 1) == ["cannot start /no/such/engine: No such file or directory"]


async def test_stop_asks_first_and_kills_after_the_grace(tmp_path: Path) -> None:
    polite = await start(tmp_path, "import signal; signal.pause()")
    assert await polite.stop(10) == Exit(-signal.SIGTERM)
    assert await polite.stop(10) == Exit(-signal.SIGTERM)
    deaf = await start(
        tmp_path / "2", "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    )
    await first_line(tmp_path / "2")
    assert (await deaf.stop(0.05)).words() == "was killed by signal 9 (SIGKILL)"


async def test_what_a_process_left_behind_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.signal(15, 1); signal.pause()'])\n"
        "print(child.pid, flush=True)"
    )
    process = await start(tmp_path, code)
    (pid,) = await asyncio.wait_for(lines_of(tmp_path, process), 5)
    async with asyncio.timeout(5):
        while process_identity(int(pid)) is not None:
            await asyncio.sleep(0.01)


async def test_a_flood_of_output_is_bounded_and_ends(tmp_path: Path) -> None:
    process = await start(tmp_path, "for at in range(60000): print('x' * 99)")
    assert await process.wait() == Exit(0)
    assert process.log.bytes_written == 6_000_000
    assert sum(path.stat().st_size for path in tmp_path.glob("own.log*")) <= 1_000_000


async def test_usage_counts_memory_that_is_its_own(tmp_path: Path) -> None:
    code = "held = bytearray(b'x') * 80_000_000; print('held', flush=True); import signal; signal.pause()"
    process = await start(tmp_path, code)
    await first_line(tmp_path)
    usage = await process.usage()
    await process.stop(1)
    assert 80_000_000 <= usage.memory_bytes <= 200_000_000
    assert usage.cpu_s > 0
    assert (await process.usage()).memory_bytes == 0


async def test_a_port_belongs_to_the_process_that_listens(tmp_path: Path) -> None:
    code = (
        "import signal, socket\n"
        "listening = socket.create_server(('127.0.0.1', 0))\n"
        "print(listening.getsockname()[1], flush=True)\n"
        "signal.pause()"
    )
    process = await start(tmp_path, code)
    port = int(await first_line(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as ours:
        assert await process.owns_port(port)
        assert not await process.owns_port(ours.getsockname()[1])
    await process.stop(1)
    assert not await process.owns_port(port)


async def test_the_life_line_is_whole_while_we_live(tmp_path: Path) -> None:
    """A child that holds the life line reads nothing from it, and ends when it is cut."""
    code = (
        "from fleetmind.node import lifeline; lifeline.hold(); print('held', flush=True); import signal; signal.pause()"
    )
    process = await start(tmp_path, code)
    assert await first_line(tmp_path) == "held"
    process._pipes.lifeline.close_ours()
    assert await process.wait() == Exit(-signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_no_process_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match="cannot start a process"):
        await start(tmp_path, "", command=Command(argv=("x" * 10_000_000,)))
