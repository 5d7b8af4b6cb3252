"""kill -9 of the engine, of the server, and of both, at random moments: what was acknowledged is kept, what was
started is ended, and whoever was being answered is told.

FLEETMIND_CHAOS_ROUNDS is the number of kills of each kind (50 for the full run), CHAOS_SEED repeats a run's moments.
"""

import asyncio
import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from tests.chaos.driver import PATIENCE_S, Home, Life, Trace, clock, open_home, roll_dice
from tests.chaos.witness import Acknowledged, Stream, check_store
from tests.flow.service import Answer, Service

from fleetmind.core.clock import Dice
from fleetmind.core.events import EventKind

ROUNDS = int(os.environ.get("FLEETMIND_CHAOS_ROUNDS", "3"))
KILLS_IN_ROW = min(5, ROUNDS)
WRITERS = 6
SPEED: dict[str, Any] = {"tokens_per_s": 100, "reply_tokens": 100, "ttft_s": 0.03, "slots": 8}
TIED, LOOSE = "tied", "loose"
"""A model whose engine dies with its server, as all of ours do, and one whose engine does not notice."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240 + 20 * ROUNDS)]


async def test_a_killed_engine_breaks_its_streams_honestly_and_is_replaced(tmp_path: Path) -> None:
    dice = roll_dice()
    answered_s: list[float] = []
    retried = 0
    async with open_home(tmp_path / "home", dice) as home:
        life = await home.start()
        await life.service.add_fake(TIED, **SPEED)
        streams: list[Stream] = []
        for _ in range(ROUNDS):
            (before,) = await life.engines(TIED)
            begun, calls, seconds = await _kill_engine_under_load(life, before, dice)
            answered_s.append(seconds)
            streams += begun
            assert begun[0].is_honestly_broken, begun[0]
            for stream in begun:
                assert stream.is_whole or stream.is_honestly_broken, stream
                assert stream.tokens == 100 or not stream.is_whole
            for call in calls:
                assert call.status == 200, call.body
            retried += sum(call.headers["x-fleetmind-replica"] != begun[0].replica for call in calls[1:])
            assert not before.lives
            home.seen.add(before)
            assert home.strays() == []
        await _check_usage(home, life, streams, tmp_path)
    print(f"engine killed to next answer: median {median(answered_s):.2f} s of {ROUNDS}; {retried} calls retried")


async def _kill_engine_under_load(life: Life, engine: Trace, dice: Dice) -> tuple[list[Stream], list[Answer], float]:
    """Kill ``engine`` under a stream that has begun, others and short calls that may not have; what they saw, and
    the seconds until the same server answered a new call."""
    service = life.service
    begun = [Stream() for _ in range(4)]
    streaming = [asyncio.ensure_future(begun[0].run(service, TIED))]
    await asyncio.wait_for(begun[0].first_token.wait(), PATIENCE_S)
    await asyncio.sleep(dice.uniform() * 0.3)
    streaming += [asyncio.ensure_future(stream.run(service, TIED)) for stream in begun[1:]]
    calls = [asyncio.ensure_future(service.chat(TIED, max_tokens=3)) for _ in range(3)]
    await asyncio.sleep(dice.uniform() * 0.08)  # their first token is due after 0.03 s
    engine.kill()
    killed_at_s = clock.monotonic_s()
    answer = await asyncio.wait_for(service.chat(TIED, max_tokens=1), PATIENCE_S)
    seconds = clock.monotonic_s() - killed_at_s
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*streaming), [answer, *await asyncio.gather(*calls)], seconds


async def _check_usage(home: Home, life: Life, streams: list[Stream], scratch: Path) -> None:
    """After an orderly end there is one row for each call, and it says how the call ended."""
    await life.service.ask("POST", "/api/stop")
    assert await asyncio.to_thread(home.reap) == 0
    told = await check_store(home.path, scratch / "copy", Acknowledged())
    rows = {row["call_id"]: row for row in told.usage}
    for stream in streams:
        row = rows[stream.call_id]
        assert row["status"] == ("ok" if stream.is_whole else "engine_error"), (row, stream)
        assert not stream.is_whole or row["completion_tokens"] == stream.tokens


@pytest.mark.parametrize("victims", ["server", "server and engines"])
async def test_a_killed_server_keeps_what_it_acknowledged_and_leaves_no_process(tmp_path: Path, victims: str) -> None:
    dice, acknowledged = roll_dice(), Acknowledged()
    cut = 0
    async with open_home(tmp_path / "home", dice) as home:
        life = await home.start()
        key = life.service.first_key
        assert key is not None
        await life.service.add_fake(TIED, **SPEED)
        await life.service.add_fake(LOOSE, outlives_server=True, **SPEED)
        for _ in range(ROUNDS):
            engines = await life.engines()
            assert len(engines) == 2
            home.seen |= engines
            streams = await _kill_server_under_load(home, life, dice, acknowledged, engines, victims)
            for stream in streams:
                _check_end_under_killed_server(stream, victims)
            cut += sum(stream.is_cut for stream in streams)
            home.check_lock_is_free()
            await check_store(home.path, tmp_path / "copy", acknowledged)
            life = await home.start()
            assert home.strays() == []
            assert not any(engine.lives for engine in engines)
            assert (await life.service.chat(TIED, key=key, max_tokens=1)).status == 200
            assert (await life.service.chat(LOOSE, key=key, max_tokens=1)).status == 200
        await acknowledged.check_service(life.service)
        await _check_doctor(life.service)
        journal = (await life.service.ask("GET", "/api/journal?kind=orphan.ended&limit=1000")).json()["entries"]
        assert bool(journal) == (victims == "server"), "the ledger is to have ended the loose engine"
        assert acknowledged.count > ROUNDS, "the kills came before anything was written; nothing was tested"
        assert cut, "no stream was under way at any kill; nothing was tested"
    print(f"{victims} killed, {home.report()}; {acknowledged.count} changes acknowledged, {cut} streams cut")


async def _kill_server_under_load(
    home: Home, life: Life, dice: Dice, acknowledged: Acknowledged, engines: set[Trace], victims: str
) -> list[Stream]:
    """Kill the server after a random number of acknowledged changes, while more are written and streams flow."""
    service = life.service
    streams = [Stream() for _ in range(4)]
    load = [asyncio.ensure_future(stream.run(service, (TIED, LOOSE)[at % 2])) for at, stream in enumerate(streams)]
    writers = [asyncio.ensure_future(acknowledged.write_until_gone(service, dice)) for _ in range(WRITERS)]
    wanted = acknowledged.count + int(dice.uniform() ** 2 * 60)
    async with asyncio.timeout(PATIENCE_S):
        while acknowledged.count < wanted and not any(writer.done() for writer in writers):
            await asyncio.sleep(0.001)
        await asyncio.sleep(dice.uniform() * 0.03)
    for writer in writers:
        if writer.done():
            raise AssertionError("a writer stopped before the kill") from writer.exception()
    if victims == "server":
        home.kill()
    else:
        first, second = sorted(engines, key=lambda _: dice.uniform())
        first.kill()
        home.kill(second)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*load, *writers)
    return streams


def _check_end_under_killed_server(stream: Stream, victims: str) -> None:
    assert not (stream.is_done and stream.error)
    if victims == "server":
        assert stream.is_cut != stream.is_whole, stream
    else:  # the engine may have gone first, and the server lived long enough to say so
        assert stream.is_cut or stream.is_whole or stream.is_honestly_broken, stream


async def _check_doctor(service: Service) -> None:
    checks = (await service.ask("GET", "/api/doctor")).json()["checks"]
    assert [check for check in checks if check["status"] == "fail"] == []


async def test_a_server_killed_again_and_again_while_it_starts_starts_at_last(tmp_path: Path) -> None:
    dice, acknowledged = roll_dice(), Acknowledged()
    async with open_home(tmp_path / "home", dice) as home:
        life = await home.start()
        key = life.service.first_key
        await life.service.add_fake(TIED, **SPEED)
        await life.service.add_fake(LOOSE, outlives_server=True, ignore_sigterm=True, **SPEED)
        for _ in range(0, ROUNDS, KILLS_IN_ROW):
            engines = await life.engines()
            home.seen |= engines
            await _kill_server_under_load(home, life, dice, acknowledged, engines, "server")
            for _ in range(KILLS_IN_ROW):
                await _kill_while_starting(home, dice)
            home.check_lock_is_free()
            await check_store(home.path, tmp_path / "copy", acknowledged)
            life = await home.start()
            assert home.strays() == []
            for model in (TIED, LOOSE):
                assert (await life.service.chat(model, key=key, max_tokens=1)).status == 200
        await acknowledged.check_service(life.service)
        await _check_doctor(life.service)
        print(f"killed while starting, {home.report()}")


async def test_a_first_start_killed_again_and_again_is_still_a_first_start(tmp_path: Path) -> None:
    dice = roll_dice()
    for number in range(0, ROUNDS, KILLS_IN_ROW):
        async with open_home(tmp_path / f"home{number}", dice, models__preload="smollm2-135m-instruct") as home:
            for _ in range(KILLS_IN_ROW):
                await _kill_while_starting(home, dice)
            life = await home.start()
            key = life.service.first_key
            assert key is not None, "nobody was ever shown the first key"
            assert life.notes == ()
            assert home.strays() == []
            answer = await life.service.chat("smollm2-135m-instruct", key=key, max_tokens=1)
            assert answer.status == 200, answer.body
            told = await check_store(home.path, tmp_path / "copy", Acknowledged())
            assert sum(entry.kind == EventKind.MODEL_ADDED for entry in told.entries) == 1


async def _kill_while_starting(home: Home, dice: Dice) -> None:
    """Kill a server within 1.5 s, counted from its start or from when it took its lock and begins to change things."""
    home.spawn()
    if dice.uniform() < 0.5:
        await home.until_locked()
    await asyncio.sleep(dice.uniform() * 1.5)
    home.kill()


@pytest.mark.real
async def test_a_real_engine_and_its_server_come_back(tmp_path: Path) -> None:
    dice, model = roll_dice(), "smollm2-135m-instruct"
    rounds, answered_s = min(3, max(1, ROUNDS // 5)), []
    settings = {"models__preload": model, "models__context_tokens": "512", "models__slots": "2"}
    async with open_home(tmp_path / "home", dice, **settings) as home:
        life = await home.start()
        key = life.service.first_key
        for _ in range(rounds):
            stream, engine = await _begin_real_stream(life, model, dice)
            home.seen.add(engine)
            engine.kill()
            killed_at_s = clock.monotonic_s()
            answer = await asyncio.wait_for(life.service.chat(model, key=key, max_tokens=4), PATIENCE_S)
            answered_s.append(clock.monotonic_s() - killed_at_s)
            assert answer.status == 200, answer.body
            assert (await asyncio.wait_for(stream, PATIENCE_S)).is_honestly_broken, stream.result()

            stream, engine = await _begin_real_stream(life, model, dice)
            home.seen.add(engine)
            home.kill()
            assert (await asyncio.wait_for(stream, PATIENCE_S)).is_cut
            await check_store(home.path, tmp_path / "copy", Acknowledged())
            life = await home.start()
            assert home.strays() == []
            answer = await asyncio.wait_for(life.service.chat(model, key=key, max_tokens=4), PATIENCE_S)
            assert answer.status == 200, answer.body
        print(f"real model, {home.report()}; engine killed to next answer: median {median(answered_s):.2f} s")


async def _begin_real_stream(life: Life, model: str, dice: Dice) -> tuple[asyncio.Task[Stream], Trace]:
    """A stream that has begun, and the process that makes its tokens."""
    stream = Stream()
    text = "Write a very long story about a fleet of ships, with many chapters."
    running = asyncio.ensure_future(stream.run(life.service, model, text, max_tokens=400, ignore_eos=True))
    await asyncio.wait_for(stream.first_token.wait(), PATIENCE_S)
    await asyncio.sleep(dice.uniform() * 0.2)
    (engine,) = await life.engines(model)
    return running, engine
