"""How engines are asked over HTTP: one small bounded GET or POST, whose failure is a value.

Knows nothing of any engine. Follows no redirect, which would carry the key elsewhere. Invariant: a server that is
down, slow, or talks nonsense never raises here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

ANSWER_BYTES_MAX = 1024**2
ANSWER_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: ``status`` 0 and a ``fault`` when nothing did. ``body`` is {} unless it was a JSON object."""

    status: int
    body: Mapping[str, Any]
    fault: str = ""


class Asker:
    """Asks one server a few questions over one connection; an async context manager."""

    def __init__(self, base_url: str, api_key: str, *, answer_s_max: float = ANSWER_S_MAX) -> None:
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=answer_s_max)

    async def __aenter__(self) -> "Asker":
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str) -> Answer:
        """GET ``path``."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """POST a JSON object to ``path``."""
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        try:
            async with self._session.request(
                method, self._base_url + path, json=body, allow_redirects=False
            ) as response:
                text = await response.content.read(ANSWER_BYTES_MAX)
                while not response.content.at_eof() and len(text) < ANSWER_BYTES_MAX:
                    text += await response.content.read(ANSWER_BYTES_MAX - len(text))
                return Answer(response.status, _object(text))
        except TimeoutError:
            return Answer(0, {}, f"no answer within {self._timeout.total:.0f} s")
        except (aiohttp.ClientError, OSError, ValueError) as fault:
            return Answer(0, {}, str(fault) or type(fault).__name__)


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
