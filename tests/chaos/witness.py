"""What clients of a server were told, and whether it still holds after the server was killed.

Writers change keys and models and remember what was acknowledged; streams say how they ended. The check reads a copy of
the database exactly as the killed server left it, and then asks the next server.
"""

import asyncio
import itertools
import json
import shutil
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tests.flow.service import Service

from fleetmind.core.clock import Dice
from fleetmind.core.events import EventKind
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of
from fleetmind.store.journal import ENTRIES_MAX, Entry, Journal
from fleetmind.store.keys import KeyRecord, Keys
from fleetmind.store.models import Models

USAGE_STATUSES = {"ok", "aborted", "refused", "no_capacity", "engine_error", "error"}
_serial = itertools.count()


class Acknowledged:
    """What was acknowledged so far. ``unsure`` is what was asked for without hearing an answer: either is right."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.revoked: dict[str, str] = {}
        self.models: set[str] = set()
        self.removed: set[str] = set()
        self.unsure: set[str] = set()
        self.count = 0

    async def write_until_gone(self, service: Service, dice: Dice) -> None:
        """Change things one after the other until the server doesn't answer any more."""
        changes = (self._create, self._create, self._revoke, self._add, self._remove)
        try:
            while True:
                await dice.choice(changes)(service)
        except (aiohttp.ClientError, OSError):
            return

    async def _create(self, service: Service) -> None:
        answer = await service.ask("POST", "/api/keys", json={"name": "chaos", "scopes": ["infer"]})
        assert answer.status == 201, answer.body
        self.keys[answer.json()["id"]] = answer.json()["key"]
        self.count += 1

    async def _revoke(self, service: Service) -> None:
        if not self.keys:
            return
        key_id, text = self.keys.popitem()
        await self._ask(service, key_id, 204, "DELETE", f"/api/keys/{key_id}")
        self.revoked[key_id] = text

    async def _add(self, service: Service) -> None:
        name = f"m{next(_serial):06}"
        await self._ask(service, name, 201, "POST", "/api/models", json={"source": "fake", "name": name, "replicas": 0})
        self.models.add(name)

    async def _remove(self, service: Service) -> None:
        if not self.models:
            return
        name = self.models.pop()
        await self._ask(service, name, 204, "DELETE", f"/api/models/{name}")
        self.removed.add(name)

    async def _ask(self, service: Service, subject: str, status: int, method: str, path: str, **options: Any) -> None:
        self.unsure.add(subject)
        answer = await service.ask(method, path, **options)
        assert answer.status == status, answer.body
        self.unsure.discard(subject)
        self.count += 1

    async def check_service(self, service: Service) -> None:
        """Every acknowledged change is in force at a server that runs."""
        listed = (await service.ask("GET", "/api/models")).json()["models"]
        names = {model["name"] for model in listed}
        assert self.models <= names, f"lost: {sorted(self.models - names)}"
        assert not self.removed & names, f"came back: {sorted(self.removed & names)}"
        for key_id, text in self.keys.items():
            assert (await service.ask("GET", "/v1/models", key=text)).status == 200, f"key {key_id} was lost"
        for key_id, text in self.revoked.items():
            assert (await service.ask("GET", "/v1/models", key=text)).status == 401, f"key {key_id} opens again"


@dataclass(frozen=True)
class Told:
    """What the database of a server says, read from a copy."""

    keys: tuple[KeyRecord, ...]
    models: frozenset[str]
    entries: tuple[Entry, ...]
    usage: tuple[dict[str, Any], ...]


async def check_store(home: Path, scratch: Path, acknowledged: Acknowledged) -> Told:
    """The database as a killed server left it is sound, and holds all that was acknowledged, each with its entry."""
    told = await _read(home, scratch)
    created, revoked, added, removed = (
        Counter(entry.subject for entry in told.entries if entry.kind == kind)
        for kind in (EventKind.KEY_CREATED, EventKind.KEY_REVOKED, EventKind.MODEL_ADDED, EventKind.MODEL_REMOVED)
    )
    for events in (created, revoked, added, removed):
        assert all(count == 1 for count in events.values()), f"twice: {events.most_common(3)}"
    ids = {record.id for record in told.keys}
    ended = {record.id for record in told.keys if record.revoked_at_s is not None}
    assert ids == created.keys(), "keys and their entries came apart"
    assert ended == revoked.keys(), "revoked keys and their entries came apart"
    assert told.models == added.keys() - removed.keys(), "models and their entries came apart"
    assert acknowledged.keys.keys() <= ids - ended
    assert acknowledged.revoked.keys() <= ended
    assert acknowledged.models <= told.models
    assert not acknowledged.removed & told.models
    for row in told.usage:
        assert row["status"] in USAGE_STATUSES, row
        assert all(row[name] for name in ("call_id", "model", "key_id", "kind", "at_s")), row
        assert min(row["prompt_tokens"], row["completion_tokens"]) >= 0, row
        assert 0 <= row["queue_s"] <= row["duration_s"], row
    assert len({row["call_id"] for row in told.usage}) == len(told.usage), "a call was counted twice"
    return told


async def _read(home: Path, scratch: Path) -> Told:
    # A copy, so that recovering the original stays the next server's task.
    scratch.mkdir(exist_ok=True)
    for name in ("fleetmind.db", "fleetmind.db-wal"):
        (scratch / name).unlink(missing_ok=True)
        if (home / name).exists():
            shutil.copyfile(home / name, scratch / name)
    database = await Database.open(f"sqlite:///{scratch / 'fleetmind.db'}")
    try:
        journal, entries = Journal(database), list[Entry]()
        while page := await journal.entries(after=len(entries), limit=ENTRIES_MAX):
            entries.extend(page)
        verdict = await journal.verify()
        assert verdict.fault is None, str(verdict.fault)
        assert verdict.count == len(entries)
        assert await fault_of(database) is None
        keys, models = tuple(await Keys(database).all()), frozenset(await Models(database).all())
    finally:
        await database.close()
    reader = sqlite3.connect(scratch / "fleetmind.db")
    reader.row_factory = sqlite3.Row
    try:
        usage = tuple(dict(row) for row in reader.execute("SELECT * FROM usage"))
    finally:
        reader.close()
    return Told(keys, models, tuple(entries), usage)


@dataclass
class Stream:
    """A streamed call, as its client saw it. ``error`` is the event that ended it, ``is_cut`` that nothing did but the
    connection's end."""

    status: int = 0
    call_id: str = ""
    replica: str = ""
    tokens: int = 0
    is_done: bool = False
    is_cut: bool = False
    is_refused: bool = False
    error: dict[str, Any] | None = None
    first_token: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_whole(self) -> bool:
        """Answered to its announced end."""
        return self.status == 200 and self.is_done and not self.is_cut and self.error is None

    @property
    def is_honestly_broken(self) -> bool:
        """Part of the answer, then an event that says so, and no announced end."""
        return self.status == 200 and self.tokens > 0 and not self.is_done and not self.is_cut and bool(self.error)

    async def run(self, service: Service, model: str, text: str = "Hello", **more: Any) -> "Stream":
        """Make the call; returns itself when it is over. A broken connection is an outcome, not an error."""
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": text}], **more}
        headers = {"Authorization": f"Bearer {service.token}"}
        try:
            async with service.session.post(f"{service.url}/v1/chat/completions", json=body, headers=headers) as answer:
                self.status = answer.status
                self.call_id = answer.headers.get("x-fleetmind-call", "")
                self.replica = answer.headers.get("x-fleetmind-replica", "")
                if answer.status != 200:
                    self.error = (await answer.json())["error"]
                    return self
                async for line in answer.content:
                    self._take(line)
        except (aiohttp.ClientError, OSError):
            self.is_refused = not self.status
            self.is_cut = True
        finally:
            self.first_token.set()  # nobody is to wait for one that will not come
        return self

    def _take(self, line: bytes) -> None:
        assert not self.is_done or not line.strip(), "something came after the end"
        if not line.startswith(b"data: "):
            assert not line.strip(), line
        elif line.strip() == b"data: [DONE]":
            self.is_done = True
        else:
            event = json.loads(line[6:])
            if "error" in event:
                self.error = event["error"]
            elif event["choices"] and event["choices"][0]["delta"].get("content"):
                self.tokens += 1
                self.first_token.set()
