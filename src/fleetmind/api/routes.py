"""Routes that say who may use them. One that doesn't say can't be made.

Rights are decided by the route object that matched, never by the text of a URL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fleetmind.api.auth import Principal, check_scope
from fleetmind.api.auth import Scope as Right
from fleetmind.api.bodies import read_body, replayed
from fleetmind.core.errors import CallerError
from fleetmind.core.types import MIB

BODY_BYTES_MAX = MIB
"""What a body may be below ``/api``: nothing there is large."""
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

PRINCIPAL = "fleetmind.principal"
"""Where the gate leaves who asks in the ASGI scope: a Principal, None for no key, or what was wrong with the key."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a route: everybody, or a key with ``right``."""

    right: Right | None

    def check(self, principal: Principal | CallerError | None) -> None:
        """Raise Unauthenticated or Forbidden unless ``principal`` may pass."""
        if self.right is not None:
            check_scope(principal, self.right)


PUBLIC = Access(None)

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def allow(access: Access | Right) -> Callable[[Endpoint], Endpoint]:
    """Declare who may use the route of the function below."""

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.access = access if isinstance(access, Access) else Access(access)  # type: ignore[attr-defined]
        return endpoint

    return declare


class GuardedRoute(APIRoute):
    """A FastAPI route that lets in whom its function's ``allow`` names."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        access = getattr(endpoint, "access", None)
        if not isinstance(access, Access):
            raise TypeError(f"route {path} does not declare who may use it: put @allow(…) on {endpoint.__name__}")
        self.access = access
        super().__init__(path, endpoint, **options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.access.check(scope.get(PRINCIPAL))
        if scope["method"] in _METHODS_WITH_BODY:
            try:
                body = await read_body(scope, receive, bytes_max=BODY_BYTES_MAX)
            except ConnectionResetError:
                return
            receive = replayed(body, receive)
        await super().handle(scope, receive, send)


class DirectRoute(Route):
    """A route whose endpoint is a bare ASGI application, for the paths where every microsecond counts."""

    def __init__(self, method: str, path: str, app: ASGIApp, access: Access | Right) -> None:
        self.access = access if isinstance(access, Access) else Access(access)
        self.method = method
        super().__init__(path, app, methods=[method], include_in_schema=False)
        self.app = app  # not wrapped as a request handler, which is what Starlette takes a plain function for

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.access.check(scope.get(PRINCIPAL))
        await super().handle(scope, receive, send)


def access_of(route: BaseRoute) -> Access:
    """Who may use ``route``. Raises TypeError for one that doesn't say."""
    access = getattr(route, "access", None)
    if not isinstance(access, Access):
        raise TypeError(f"{route!r} does not declare who may use it")
    return access
