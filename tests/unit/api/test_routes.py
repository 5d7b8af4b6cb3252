import pytest
from fastapi import FastAPI

from fleetmind.api.auth import Principal, Scope
from fleetmind.api.routes import PUBLIC, DirectRoute, GuardedRoute, access_of, allow
from fleetmind.core.errors import Forbidden, Unauthenticated
from fleetmind.core.types import KeyId


def test_a_route_that_does_not_say_who_may_use_it_cannot_be_made() -> None:
    app = FastAPI()
    app.router.route_class = GuardedRoute

    async def endpoint() -> None: ...

    with pytest.raises(TypeError, match="does not declare who may use it"):
        app.get("/x")(endpoint)
    app.get("/x")(allow(PUBLIC)(endpoint))


def test_access_is_the_routes_own() -> None:
    async def app(*_: object) -> None: ...

    route = DirectRoute("POST", "/v1/x", app, Scope.INFER)
    access = access_of(route)
    access.check(Principal(KeyId("k"), frozenset({Scope.INFER})))
    with pytest.raises(Unauthenticated):
        access.check(None)
    with pytest.raises(Forbidden):
        access.check(Principal(KeyId("k"), frozenset({Scope.READ})))
    PUBLIC.check(None)
    PUBLIC.check(Unauthenticated("wrong key"))
