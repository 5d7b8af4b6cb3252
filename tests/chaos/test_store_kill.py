"""kill -9 at random moments: nothing that was acknowledged is lost."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from fleetmind.core.clock import Dice
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of
from fleetmind.store.journal import Journal
from fleetmind.store.models import Models

KILLS = 20
WRITERS = 16

# Says "n" only after the write of n returned. Runs until it is killed.
CHILD = """
import asyncio, os, sys
from fleetmind.core.events import Event, EventKind
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of
from fleetmind.store.models import Models

async def writer(models, first, step):
    number = first
    while True:
        name = f"m{number:09}"
        await models.save(name, {"n": number}, Event(EventKind.MODEL_ADDED, name, 1.0, {"n": number}))
        os.write(1, f"{number}\\n".encode())
        number += step

async def main(url, first, writers):
    models = Models(await Database.open(url))
    await asyncio.gather(*(writer(models, first + n, writers) for n in range(writers)))

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.mark.chaos
async def test_no_acknowledged_write_is_lost_to_kill_9(tmp_path: Path) -> None:
    dice = Dice(int(os.environ.get("CHAOS_SEED", "0")) or None)
    print(f"CHAOS_SEED={dice.seed}")
    path = tmp_path / "fleetmind.db"
    acknowledged: set[int] = set()
    for round_number in range(KILLS):
        heard = _write_until_killed(f"sqlite:///{path}", round_number * 1_000_000, dice)
        acknowledged |= heard
        if round_number % 5 == 4:
            await _check(path, acknowledged)
    await _check(path, acknowledged)
    assert len(acknowledged) > KILLS, "the kills came before anything was written; nothing was tested"


def _write_until_killed(url: str, first: int, dice: Dice) -> set[int]:
    """Numbers acknowledged by a child that was killed after a random number of them, or a random time."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, url, str(first), str(WRITERS)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    wanted = int(dice.uniform() ** 2 * 400)
    heard = b""
    try:
        # Some are killed while they open and recover; the bound keeps a stuck child from hanging the test.
        patience_s = 30.0 if wanted > 20 else dice.uniform() * 0.6
        while heard.count(b"\n") < wanted:
            if not select.select([child.stdout], [], [], patience_s)[0]:
                break
            part = os.read(child.stdout.fileno(), 65536)
            assert part, "the child ended by itself"
            heard += part
    finally:
        child.kill()
        rest = child.stdout.read()
        child.wait()
    # The last line may be cut: it was not acknowledged as far as anybody can tell.
    return {int(line) for line in (heard + rest).split(b"\n")[:-1]}


async def _check(path: Path, acknowledged: set[int]) -> None:
    database = await Database.open(f"sqlite:///{path}")
    try:
        kept = {int(name[1:]) for name in await Models(database).all()}
        verdict = await Journal(database).verify()
        damage = await fault_of(database, is_thorough=True)
    finally:
        await database.close()
    assert acknowledged <= kept, f"lost: {sorted(acknowledged - kept)[:10]}"
    assert damage is None
    assert verdict.fault is None, str(verdict.fault)
    assert verdict.count == len(kept), "a change and its event came apart"
