"""Who may do what: keys, scopes, and that no route and no spelling of a path goes round them."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
from starlette.routing import Route
from tests.flow.service import Answer, Service, running, until
from tests.flow.wire import error_of, get, say

from fleetmind.api import manage, openai
from fleetmind.api.auth import Scope
from fleetmind.api.routes import access_of
from fleetmind.core.config import load
from fleetmind.fleet.snapshot import FleetSnapshot
from fleetmind.gateway.dispatch import Gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
PUBLIC_PATHS = {"/", "/static/{name}", "/health", "/ready"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(tmp_path_factory.mktemp("access")) as service:
        await service.add_fake("fake")
        await service.add_fake("other")
        yield service


async def make_key(service: Service, **fields: Any) -> tuple[str, str]:
    """Id and text of a new key."""
    answer = await service.ask("POST", "/api/keys", json={"name": "test", **fields})
    assert answer.status == 201, answer.body
    return answer.json()["id"], answer.json()["key"]


def all_routes() -> list[tuple[str, str, Scope | None]]:
    """Method, path and needed scope of every route, as the server is built."""
    settings = load(Path("/nonexistent"), environ={}, flags={})
    unused = cast(Gateway, None)
    direct = openai.routes(unused, cast(Any, FleetSnapshot), settings.settings.server)
    app = manage.build(cast(manage.Parts, SimpleNamespace(configuration=settings)), direct)
    return [
        (method, route.path, access_of(route).right)
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]


ROUTES = all_routes()


async def test_the_public_routes_are_the_known_ones_and_only_read() -> None:
    assert {path for _, path, right in ROUTES if right is None} == PUBLIC_PATHS
    assert {method for method, _, right in ROUTES if right is None} == {"GET"}


async def test_what_changes_something_needs_the_right_to() -> None:
    calls = {("POST", f"/v1/{kind}") for kind in ("chat/completions", "completions", "embeddings")}
    reads = {("POST", "/api/fit")}  # reads a file's header
    changing = {(method, path) for method, path, right in ROUTES if method != "GET" and right is not Scope.ADMIN}
    assert changing == calls | reads
    assert {right for method, path, right in ROUTES if path.startswith("/v1/")} == {Scope.INFER}


@pytest.mark.parametrize(("method", "path", "right"), ROUTES, ids=lambda value: str(value))
async def test_a_route_lets_in_only_who_may(service: Service, method: str, path: str, right: Scope | None) -> None:
    where = path.format(name="none", replica_id="none", key_id="none")
    if right is None:
        for key in (None, "fm_wrong"):
            assert (await service.ask(method, where, key=key)).status in (200, 404)
        return
    answer = await service.ask(method, where, key=None, json={})
    assert answer.status == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    _, key = await make_key(service, scopes=[scope for scope in Scope if scope is not right])
    answer = await service.ask(method, where, key=key, json={})
    assert answer.status == 403
    assert str(right) in error_of(answer)["message"]


async def test_without_a_key_nobody_learns_which_paths_exist(service: Service) -> None:
    known = await service.ask("GET", "/api/status", key=None)
    unknown = await service.ask("GET", "/api/nothing", key=None)
    assert (known.status, known.body) == (unknown.status, unknown.body)
    assert (await service.ask("GET", "/api/nothing")).status == 404
    assert (await service.ask("PATCH", "/api/status", key=None)).status == 401
    assert (await service.ask("PATCH", "/api/status")).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/%61pi/status",
        "/api%2fstatus",
        "//api/status",
        "/api//status",
        "/./api/status",
        "/health/../api/status",
        "/%2e%2e/api/status",
        "/static/../api/status",
        "/static/%2e%2e/%2e%2e/pepper",
        "/static/..%2f..%2fauth.py",
        "/static//etc/passwd",
        "/api/status/",
        "/api/status;x",
        "/api/status%00",
        "/api/status%0a",
        "/API/STATUS",
        "/api/status#health",
        "/metrics?x=/health",
        "/%76%31/models",
        "/v1/models/",
        "/v1/models%2f",
        "/v1//chat/completions",
    ],
)
async def test_no_spelling_of_a_path_goes_round_the_key(service: Service, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS", "TRACE"):
        (answer,) = await say(service.url, get(service.host, path, "Content-Length: 0", method=method))
        assert answer.status == 401, (method, path)


async def test_a_spelling_that_means_the_same_path_is_the_same_path(service: Service) -> None:
    key = f"Authorization: Bearer {service.token}"
    for path, status in (("/%61pi/status", 200), ("//api/status", 404), ("/api//status", 404), ("/api/status/", 404)):
        (answer,) = await say(service.url, get(service.host, path, key))
        assert answer.status == status, path


# Keys


async def chat(service: Service, key: str | None, model: str = "fake", **options: Any) -> Answer:
    return await service.ask("POST", "/v1/chat/completions", key=key, json=CHAT | {"model": model}, **options)


@pytest.mark.parametrize(
    "key",
    [
        "fm_wrong",
        "sk-proj-something",
        "fm_" + "a" * 8 + "_" + "b" * 43 + "_" + "c" * 6,
        "x" * 10_000,
        "\u00e4",
        "null",
        "' OR 1=1 --",
    ],
    ids=lambda key: key[:12],
)
async def test_a_wrong_key_is_refused(service: Service, key: str) -> None:
    for path in ("/v1/models", "/api/status", "/metrics"):
        answer = await service.ask("GET", path, key=key)
        assert answer.status == 401
        assert key not in error_of(answer)["message"]


async def test_a_key_that_differs_in_one_character_is_refused(service: Service) -> None:
    _, key = await make_key(service)
    assert (await chat(service, key)).status == 200
    for changed in (key[:-1], key + "0", key.swapcase(), key.replace("fm_", "FM_"), key[:20] + "_" + key[21:]):
        assert (await chat(service, changed)).status == 401


async def test_a_revoked_key_ends_at_once(service: Service) -> None:
    key_id, key = await make_key(service)
    assert (await chat(service, key)).status == 200
    assert (await service.ask("DELETE", f"/api/keys/{key_id}")).status == 204
    assert (await chat(service, key)).status == 401
    assert (await service.ask("DELETE", f"/api/keys/{key_id}")).status == 404
    (record,) = [r for r in (await service.ask("GET", "/api/keys")).json()["keys"] if r["id"] == key_id]
    assert record["revoked_at_s"] is not None


async def test_a_revoked_key_stays_revoked_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as first:
        revoked_id, revoked = await make_key(first)
        _, kept = await make_key(first)
        operator = first.token
        await first.ask("DELETE", f"/api/keys/{revoked_id}")
    async with running(tmp_path) as second:
        assert second.first_key is None
        assert (await second.ask("GET", "/v1/models", key=kept)).status == 200
        assert (await second.ask("GET", "/v1/models", key=revoked)).status == 401
        assert (await second.ask("GET", "/v1/models", key=operator)).status == 401, "its life was that of the server"


async def test_a_key_expires(service: Service) -> None:
    _, key = await make_key(service, expires_in_s=1)

    async def is_refused() -> bool:
        return (await service.ask("GET", "/v1/models", key=key)).status == 401

    await until(is_refused, "the key has expired")


async def test_a_key_for_one_model_opens_and_shows_no_other(service: Service) -> None:
    _, key = await make_key(service, models=["other"])
    assert (await chat(service, key, "other")).status == 200
    answer = await chat(service, key, "fake")
    assert answer.status == 403
    assert error_of(answer)["code"] == "forbidden"
    assert (await chat(service, key, "unknown")).body == (await chat(service, key, "unknown")).body
    assert (await chat(service, key, "unknown")).status == 403, "it learns nothing of what else there is"
    listed = (await service.ask("GET", "/v1/models", key=key)).json()["data"]
    assert [model["id"] for model in listed] == ["other"]


async def test_a_model_named_twice_is_checked_as_it_is_served(service: Service) -> None:
    _, key = await make_key(service, models=["other"])
    for body in (b'{"model":"fake","model":"other"%s', b'{"model":"other","model":"fake"%s'):
        data = body % b',"messages":[{"role":"user","content":"x"}]}'
        answer = await service.ask("POST", "/v1/chat/completions", key=key, data=data)
        assert answer.status == 403 or answer.json()["model"] == "other"


async def test_the_first_key_calls_and_reads_but_changes_nothing(service: Service) -> None:
    assert service.first_key
    assert (await chat(service, service.first_key)).status == 200
    for path in ("/api/status", "/metrics"):
        assert (await service.ask("GET", path, key=service.first_key)).status == 200
    assert (await service.ask("POST", "/api/stop", key=service.first_key)).status == 403
    assert (await service.ask("GET", "/api/keys", key=service.first_key)).status == 403


@pytest.mark.parametrize(
    "headers",
    [
        ("Authorization: Bearer {key}", "Authorization: Bearer {key}"),
        ("Authorization: Bearer fm_wrong", "Authorization: Bearer {key}"),
        ("Authorization: Basic {key}",),
        ("Authorization: {key}",),
        ("X-API-Key: {key}",),
        ("Api-Key: {key}", "Authorization: Bearer {key}"),
    ],
    ids=str,
)
async def test_a_key_comes_once_and_in_its_header(service: Service, headers: tuple[str, ...]) -> None:
    lines = [line.format(key=service.token) for line in headers]
    (answer,) = await say(service.url, get(service.host, "/v1/models", *lines))
    assert answer.status == 400
    assert service.token not in answer.body.decode()


@pytest.mark.parametrize(
    "query", ["key={key}", "api_key={key}", "access_token=x", "x={key}", "API_KEY=x", "x=1&token=y"]
)
async def test_a_key_in_the_address_is_refused_even_beside_a_good_one(service: Service, query: str) -> None:
    for path in ("/v1/models", "/health", "/", "/nothing"):
        answer = await service.ask("GET", f"{path}?{query.format(key=service.token)}")
        assert answer.status == 400
        assert service.token not in answer.body.decode()
    assert service.token not in (service.home / "logs" / "server.log").read_text()


async def test_an_empty_key_is_none(service: Service) -> None:
    for value in ("Bearer", "Bearer ", "bearer    "):
        (answer,) = await say(service.url, get(service.host, "/v1/models", f"Authorization: {value}"))
        assert answer.status in (400, 401)


async def test_no_file_of_the_home_holds_a_key_or_can_be_read_by_others(service: Service) -> None:
    _, key = await make_key(service, name="secret-bearer")
    await chat(service, key)
    for path in service.home.rglob("*"):
        assert not path.stat().st_mode & 0o077, f"{path} can be read by others"
        if path.is_file():
            assert key.encode() not in path.read_bytes(), f"{path} holds the key"
