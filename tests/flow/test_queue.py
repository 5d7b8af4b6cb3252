"""More calls than slots: who waits, who is refused and told when to come back, and in which order they are served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from tests.flow.engines import REPLY, Script, fake_engine, far_key, scripted_engine, served
from tests.flow.service import Answer, Service, running, until
from tests.flow.wire import error_of


@asynccontextmanager
async def busy(home: Path, *, queued: int, **flags: str) -> AsyncIterator[tuple[Service, list[asyncio.Future[Answer]]]]:
    """A service with one slot, taken by a call that never ends, and ``queued`` calls waiting behind it."""
    async with (
        fake_engine(ttft_s=3600, slots=1) as engine,
        running(home, **flags) as service,
        served(service, engine, slots=1),
    ):
        calls = [asyncio.ensure_future(service.chat("far"))]
        await until(lambda: engine.count("active", 1), "the slot is taken")
        for waiting in range(queued):
            calls.append(asyncio.ensure_future(service.chat("far")))
            await service.until_calls(outstanding=1, queued=waiting + 1)
        yield service, calls
        for call in calls:
            call.cancel()
        await service.until_calls(outstanding=0)


async def test_past_the_bound_of_the_line_a_call_is_refused_at_once(tmp_path: Path) -> None:
    with far_key():
        async with busy(tmp_path, queued=2, gateway__queue_calls_max="2") as (service, calls):
            answer = await service.chat("far")
            assert answer.status == 429
            error = error_of(answer)
            assert (error["code"], error["type"], error["origin"]) == ("queue_full", "rate_limit_error", "gateway")
            assert error["retry_after_s"] >= 1
            assert int(answer.headers["retry-after"]) >= error["retry_after_s"]
            assert "gateway.queue_calls_max" in error["hint"]
            assert (await service.chat("far", stream=True)).status == 429, "a stream is told in the same way"
            calls[1].cancel()
            await service.until_calls(outstanding=1, queued=1)
            calls.append(asyncio.ensure_future(service.chat("far")))
            await service.until_calls(outstanding=1, queued=2)


async def test_a_line_without_room_takes_nobody(tmp_path: Path) -> None:
    with far_key():
        async with busy(tmp_path, queued=0, gateway__queue_calls_max="0") as (service, _):
            assert (await service.chat("far")).status == 429


async def test_a_call_that_waited_as_long_as_it_may_is_refused(tmp_path: Path) -> None:
    with far_key():
        async with busy(tmp_path, queued=0, gateway__queue_wait_s_max="0.3") as (service, _):
            answer = await service.chat("far")
            assert answer.status == 503
            error = error_of(answer)
            assert error["code"] == "queue_timeout"
            assert error["retry_after_s"] >= 1
            assert int(answer.headers["retry-after"]) >= error["retry_after_s"]
            assert (await service.calls()) == {"outstanding": 1, "queued": 0}


async def test_one_models_line_holds_up_no_other_model(tmp_path: Path) -> None:
    with far_key():
        async with busy(tmp_path, queued=2) as (service, _):
            await service.add_fake("other")
            assert (await service.chat("other")).status == 200


async def test_who_waits_is_served_in_order(tmp_path: Path) -> None:
    turn = asyncio.Semaphore(0)

    def gated() -> Script:
        async def line(_: web.Request) -> web.StreamResponse:
            await turn.acquire()
            return web.Response(body=REPLY, content_type="application/json")

        return line

    with far_key():
        async with scripted_engine() as engine, running(tmp_path) as service, served(service, engine, slots=1):
            engine.script.extend(gated() for _ in range(8))
            calls = []
            for number in range(8):
                calls.append(asyncio.ensure_future(service.chat("far", f"call {number}")))
                await service.until_calls(outstanding=1, queued=number)
            for _ in calls:
                turn.release()
            assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 8
            asked = [body.decode().partition("call ")[2][0] for body in engine.bodies]
            assert asked == [str(number) for number in range(8)]


async def test_a_crowd_is_served_without_an_engine_ever_holding_more_than_its_slots(tmp_path: Path) -> None:
    with far_key():
        async with fake_engine(slots=100, ttft_s=0.01) as engine, running(tmp_path) as service, served(service, engine):
            answers = await asyncio.gather(*(service.chat("far", max_tokens=2) for _ in range(200)))
            assert {answer.status for answer in answers} == {200}
            state = await engine.state()
            assert state["served"] == 200
            assert 1 < state["peak"] <= 4
            assert (await service.usage(200))["completion_tokens"] == 400
