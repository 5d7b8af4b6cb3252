"""The page at ``/``: files that ship with the package, under a strict content policy.

Public and without data: what the page shows it asks for with the key of who looks at it.
"""

from importlib import resources

from fastapi import FastAPI, Response

from fleetmind.api.routes import PUBLIC, allow
from fleetmind.core.errors import NotFound

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "content-security-policy": _CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_PAGE_FILES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}


def add_page(app: FastAPI) -> None:
    """Add the routes of the page."""
    static = resources.files("fleetmind.api") / "static"

    @app.get("/", include_in_schema=False)
    @allow(PUBLIC)
    async def page() -> Response:
        return Response((static / "index.html").read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    @app.get("/static/{name}", include_in_schema=False)
    @allow(PUBLIC)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_FILES:
            raise NotFound("There is no such file.")
        return Response((static / name).read_bytes(), media_type=_PAGE_FILES[name], headers=_PAGE_HEADERS)
