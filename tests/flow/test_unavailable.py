"""Models that can't answer: loading, failing, too large, removed. Who can be served soon waits, others are told why."""

import asyncio
from pathlib import Path

from tests.flow.service import Service, running, until
from tests.flow.wire import error_of

CARD = "devices:\n  - {name: card, memory: 8GiB}\n"


async def told(service: Service, model: str, *words: str) -> None:
    """A call of ``model`` is refused at once with ``words`` and a time to come back."""
    for is_stream in (False, True):
        answer = await service.chat(model, stream=is_stream)
        assert answer.status == 503
        error = error_of(answer)
        assert error["code"] == "model_unavailable"
        assert error["retry_after_s"] >= 1
        assert "retry-after" in answer.headers
        for word in words:
            assert word in error["message"]


async def test_a_call_waits_for_a_model_that_is_loading(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("slow", is_awaited=False, load_s=1)
        answers = await asyncio.gather(service.chat("slow"), service.chat("slow"), service.listen("slow"))
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert float(answers[0].headers["x-fleetmind-queue-ms"]) > 0
        ready = await service.ask("GET", "/ready", key=None)
        assert ready.json() == {"ready": True, "reason": ""}


async def test_a_model_that_fits_nowhere_is_refused_at_once_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "devices.yaml").write_text(CARD)
    async with running(tmp_path / "home", node__devices_file=str(tmp_path / "devices.yaml")) as service:
        await service.add_fake("huge", is_awaited=False, memory_bytes=24 * 1024**3)
        await service.until_state("huge", "failed")
        await told(service, "huge", "huge", "card", "24.0 GiB")
        refusals = (await service.ask("GET", "/api/placement")).json()["refusals"]
        assert [(refusal["model"], refusal["device"]) for refusal in refusals] == [("huge", "card")]
        ready = await service.ask("GET", "/ready", key=None)
        assert (ready.status, ready.json()["ready"]) == (503, False)
        assert "huge" in ready.json()["reason"]
        await service.add_fake("small", memory_bytes=1024**3)
        assert (await service.chat("small")).status == 200


async def test_who_waited_for_a_model_is_told_when_it_turns_out_to_fit_nowhere(tmp_path: Path) -> None:
    (tmp_path / "devices.yaml").write_text(CARD)
    async with running(tmp_path / "home", node__devices_file=str(tmp_path / "devices.yaml")) as service:
        await service.add_fake("huge", is_awaited=False, memory_bytes=24 * 1024**3)
        answer = await service.chat("huge")
        assert answer.status == 503
        assert "card" in error_of(answer)["message"]


async def test_a_model_whose_engine_never_starts_is_refused_with_what_its_log_says(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("broken", is_awaited=False, crash_on_start=True)
        waited = await service.chat("broken")
        assert waited.status == 503, "also who came before it was known"
        await told(service, "broken", "broken", "simulated crash at the start")


async def test_a_model_without_wanted_replicas_is_refused_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("resting", is_awaited=False, replicas=0)
        await service.until_state("resting", "failed")
        await told(service, "resting", "no replicas")


async def test_a_removed_model_is_unknown_and_its_last_calls_are_finished(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("leaving", slots=1, tokens_per_s=20, reply_tokens=20)
        calls = [asyncio.ensure_future(service.listen("leaving")) for _ in range(3)]
        await service.until_calls(outstanding=1, queued=2)
        assert (await service.ask("DELETE", "/api/models/leaving")).status == 204
        assert (await service.chat("leaving")).status == 404
        heard = await asyncio.gather(*calls)
        assert sorted(one.status for one in heard) == [200, 503, 503], "who waited is told, who was served is served"
        assert [one.is_whole for one in heard if one.status == 200] == [True]

        async def is_gone() -> bool:
            return not await service.replicas("leaving")

        await until(is_gone, "its replica has ended")


async def test_a_model_added_again_is_never_answered_by_the_one_before(tmp_path: Path) -> None:
    async with running(tmp_path, fleet__reconcile_interval_s="60") as service:
        seen = set()
        for _ in range(5):
            await service.add_fake("again", is_awaited=False)
            answer = await service.chat("again", max_tokens=1)
            assert answer.status == 200
            seen.add(answer.headers["x-fleetmind-replica"])
            assert (await service.ask("DELETE", "/api/models/again")).status == 204
        assert len(seen) == 5


async def test_a_replica_that_is_restarted_finishes_its_calls_and_drops_none(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        await service.add_fake("fake", slots=1, tokens_per_s=20, reply_tokens=20)
        (before,) = await service.replicas()
        calls = [asyncio.ensure_future(service.listen("fake")) for _ in range(2)]
        await service.until_calls(outstanding=1, queued=1)
        assert (await service.ask("POST", f"/api/replicas/{before['id']}/restart")).status == 202
        heard = await asyncio.gather(*calls)
        assert [one.is_whole for one in heard] == [True, True]
        assert {one.headers["x-fleetmind-replica"] for one in heard} > {before["id"]}, "one by the new replica"
