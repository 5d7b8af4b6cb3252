"""A full disk: what must be kept is refused, calls are served all the same, and with room it goes on by itself."""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from tests.flow.child import Child, running_apart
from tests.flow.service import until
from tests.flow.wire import error_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")


def fill_disk(child: Child) -> None:
    """From now on the service can't make any file longer, as on a disk without room."""
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def make_room(child: Child) -> None:
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


async def test_with_a_full_disk_keys_are_refused_calls_are_served_and_it_recovers(tmp_path: Path) -> None:
    async with running_apart(tmp_path) as child:
        await child.add_fake("fake")
        kept = (await child.ask("POST", "/api/keys", json={"name": "before"})).json()["key"]
        fill_disk(child)

        answer = await child.ask("POST", "/api/keys", json={"name": "during"})
        assert answer.status == 503
        error = error_of(answer)
        assert (error["code"], error["type"], error["origin"]) == ("store_error", "server_error", "gateway")
        assert "disk is full" in error["hint"]
        assert str(tmp_path) not in answer.body.decode()
        assert (await child.ask("POST", "/api/models", json={"source": "fake", "name": "during"})).status == 503
        assert (await child.ask("DELETE", "/api/models/fake")).status == 503

        for _ in range(20):
            assert (await child.chat("fake")).status == 200
            assert (await child.ask("GET", "/v1/models", key=kept)).status == 200
        assert (await child.ask("GET", "/api/status")).status == 200
        assert "during" not in str((await child.ask("GET", "/api/keys")).json())
        loops = (await child.ask("GET", "/api/status")).json()["loops"]
        assert {loop["state"] for loop in loops} == {"running"}, "none gave up"

        make_room(child)

        async def look() -> bool:
            return (await child.ask("POST", "/api/keys", json={"name": "after"})).status == 201

        await until(look, "a key is made again")

        async def is_counted() -> bool:
            rows = (await child.ask("GET", "/api/usage")).json()["rows"]
            return sum(row["calls"] for row in rows) == 20

        await until(is_counted, "the calls of the time without room are accounted for, each once")
        checks = (await child.ask("GET", "/api/doctor")).json()["checks"]
        assert [check for check in checks if check["status"] == "fail"] == []
    async with running_apart(tmp_path) as child:
        assert (await child.ask("GET", "/v1/models", key=kept)).status == 200


async def test_a_service_killed_on_a_full_disk_has_lost_nothing_acknowledged(tmp_path: Path) -> None:
    async with running_apart(tmp_path) as child:
        keys = [(await child.ask("POST", "/api/keys", json={"name": f"k{n}"})).json()["key"] for n in range(5)]
        fill_disk(child)
        assert (await child.ask("POST", "/api/keys", json={"name": "lost"})).status == 503
        os.kill(child.pid, signal.SIGKILL)
    async with running_apart(tmp_path) as child:
        for key in keys:
            assert (await child.ask("GET", "/v1/models", key=key)).status == 200
