"""Which models there are: what a client may name, and how each is to be served.

Takes models in (packaged, a local file, a name elsewhere, a fake), checks them at the door, keeps them in the store and
in memory. It places nothing and starts nothing. The invariant: what ``models`` shows is in the store, together with the
journal entry that says how it came there; a document that can't be read is reported and never fatal.
"""

import asyncio
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from fleetmind.core.clock import Clock
from fleetmind.core.errors import Conflict, InvalidModelFile, InvalidRequest, ModelNotFound, NotFound
from fleetmind.core.events import Event, EventKind
from fleetmind.core.settings import Settings
from fleetmind.core.telemetry import log
from fleetmind.core.types import ModelName
from fleetmind.fleet import documents, packaged
from fleetmind.fleet.documents import Entry, FileMark
from fleetmind.fleet.gguf import GgufHeader, read_header
from fleetmind.fleet.snapshot import Model, ModelSource
from fleetmind.node.engines.fake_knobs import Knobs
from fleetmind.node.protocol import Ability

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
MODELS_MAX = 1000
REPLICAS_MAX = 64
SLOTS_MAX = 100_000
CONTEXT_TOKENS_MIN, CONTEXT_TOKENS_MAX = 64, 16 * 1024**2
URL_CHARS_MAX = 2048
NEAR_MAX, NEAR_CUTOFF = 3, 0.5


class Documents(Protocol):
    """Where entries are kept: ``store.models.Models``, or memory in tests."""

    async def save(self, name: str, document: Mapping[str, object], *events: Event) -> None: ...
    async def all(self) -> dict[str, dict[str, object]]: ...
    async def delete(self, name: str, *events: Event) -> bool: ...


class Catalog:
    """The models of this fleet. Use from one event loop.

    ``home`` is FLEETMIND_HOME, where fetched weights are in ``models/``.
    """

    def __init__(
        self,
        store: Documents,
        settings: Settings,
        clock: Clock,
        *,
        home: Path,
        package: packaged.Package = packaged.SMOLLM2,
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._models_dir = home / "models"
        self._package = package
        self._entries: dict[ModelName, Entry] = {}
        self._models: Mapping[ModelName, Model] = {}
        self._broken: dict[str, str] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._changing = asyncio.Lock()
        self._log = log("fleet.catalog")

    # -- what it knows ------------------------------------------------------------------------------------------

    async def load(self) -> tuple[str, ...]:
        """Read every entry from the store; a sentence for each that can't be read, which ``broken`` also lists."""
        for name, document in (await self._store.all()).items():
            try:
                entry = documents.read(name, document)
            except ValueError as error:
                self._broken[name] = str(error)
                self._log.error("a model's entry can't be read", model=name, reason=str(error))
            else:
                self._entries[entry.model.name] = entry
        self._tell()
        return tuple(f"the entry of model {name} can't be read: {why}" for name, why in self._broken.items())

    def models(self) -> Mapping[ModelName, Model]:
        """All models by name. A new mapping after each change; never changed itself."""
        return self._models

    def all(self) -> tuple[Model, ...]:
        """All models in the order of their names."""
        return tuple(self._models[name] for name in sorted(self._models))

    def broken(self) -> Mapping[str, str]:
        """Names in the store whose entry can't be read, and why. ``remove`` clears one away."""
        return dict(self._broken)

    def find(self, name: str) -> Model | None:
        """The model of that name, if there is one."""
        return self._models.get(ModelName(name))

    def get(self, name: str) -> Model:
        """The model of that name. Raises ModelNotFound with the nearest names."""
        model = self.find(name)
        if model is None:
            raise self._unknown(name)
        return model

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call back, in the loop, after each change. It must return at once and not raise."""
        self._subscribers.append(callback)

    # -- what changes it ----------------------------------------------------------------------------------------

    async def add_file(
        self,
        path: Path,
        *,
        name: str | None = None,
        context_tokens: int | None = None,
        slots: int | None = None,
        replicas: int = 1,
        options: Mapping[str, object] | None = None,
    ) -> Model:
        """Add a GGUF file. Without a name it gets one from the file's; without a context and slots, the defaults.

        More context than the model was trained for is cut to that, and the model's ``note`` says so. ``options`` are
        those of FILE_OPTIONS. Raises InvalidModelFile, InvalidRequest, Conflict.
        """
        chosen = _checked_name(name if name is not None else slug(Path(path).stem))
        _check_file_options(options or {})
        self._refuse_taken(chosen)
        real, mark, header = await asyncio.to_thread(_read_file, path)
        model = self._from_header(chosen, ModelSource.FILE, real, header, context_tokens, slots, replicas)
        if options:
            wants_vectors = bool(options.get("embedding", Ability.EMBEDDING in model.abilities))
            model = replace(model, options=dict(options), abilities=_abilities(gives_embeddings=wants_vectors))
        return await self._add(Entry(model, mark))

    async def add_packaged(self, *, context_tokens: int | None = None, slots: int | None = None) -> Model:
        """Add the packaged model, verified by hash; the one already added is returned as it is.

        Raises NotFound, whose hint says how to fetch it, when the package is not on this machine.
        """
        known = self.find(self._package.model)
        if known is not None and known.source is ModelSource.PACKAGED:
            return known
        self._refuse_taken(self._package.model)
        path = await asyncio.to_thread(packaged.verified, self._models_dir, self._package)
        real, mark, header = await asyncio.to_thread(_read_file, path)
        name = self._package.model
        model = self._from_header(name, ModelSource.PACKAGED, real, header, context_tokens, slots, 1)
        return await self._add(Entry(replace(model, sha256=self._package.file_sha256), mark))

    async def add_remote(
        self,
        name: str,
        url: str,
        *,
        remote_model: str | None = None,
        key_env: str | None = None,
        slots: int | None = None,
        context_tokens: int | None = None,
    ) -> Model:
        """Add a model that an OpenAI-compatible server elsewhere answers for.

        ``url`` is its base; ``/v1`` is added where it is missing. A key is named by the environment variable it is in
        and never stored. A context of 0 means unknown. Raises InvalidRequest, Conflict.
        """
        chosen = _checked_name(name)
        if key_env is not None and not ENVIRONMENT_NAME.fullmatch(key_env):
            raise InvalidRequest(
                "key_env is not the name of an environment variable",
                hint="put the key into a variable of the server's environment and give the variable's name",
                param="key_env",
            )
        model = Model(
            name=chosen,
            source=ModelSource.REMOTE,
            engine="remote",
            context_tokens=0 if context_tokens is None else _bounded("context_tokens", context_tokens),
            slots=_bounded("slots", self._settings.gateway.remote_slots if slots is None else slots),
            abilities=frozenset(Ability),
            url=_checked_url(url),
            remote_model=remote_model or chosen,
            key_env=key_env,
            added_at_s=self._clock.now_s(),
        )
        return await self._add(Entry(model))

    async def add_fake(
        self,
        name: str,
        options: Mapping[str, object],
        *,
        context_tokens: int | None = None,
        slots: int | None = None,
        replicas: int = 1,
    ) -> Model:
        """Add a model whose answers are invented. ``options`` are the fake engine's knobs; ``memory_bytes`` is what it
        claims of a simulated device. Raises InvalidRequest, Conflict."""
        try:
            knobs = Knobs().changed(options)
        except ValueError as error:
            raise InvalidRequest(str(error), param="options") from error
        embeds = frozenset({Ability.EMBEDDING}) if knobs.embedding_dimensions else frozenset()
        model = Model(
            name=_checked_name(name),
            source=ModelSource.FAKE,
            engine="fake",
            context_tokens=_bounded("context_tokens", context_tokens or knobs.context_tokens),
            slots=_bounded("slots", slots or knobs.slots),
            replicas_wanted=_bounded("replicas", replicas),
            abilities=frozenset({Ability.CHAT, Ability.COMPLETION}) | embeds,
            options=dict(options),
            added_at_s=self._clock.now_s(),
        )
        return await self._add(Entry(model))

    async def remove(self, name: str) -> None:
        """Take a model out of the catalogue; its file stays. Raises ModelNotFound with the nearest names."""
        async with self._changing:
            if name not in self._models and name not in self._broken:
                raise self._unknown(name)
            await self._store.delete(name, Event(EventKind.MODEL_REMOVED, name, self._clock.now_s()))
            self._entries.pop(ModelName(name), None)
            self._broken.pop(name, None)
            self._tell()

    async def check(self, name: str) -> str | None:
        """Why the model's file can't be used now; None when it can, or when it has none.

        Costs one stat while the file is untouched. One that was touched is read (and a packaged one hashed) again: if
        it still is the same model its new mark is remembered. A packaged file that has moved is found again.
        """
        entry = self._entries.get(ModelName(name))
        if entry is None or entry.model.path is None:
            return None
        try:
            found = await asyncio.to_thread(self._checked, entry)
        except (InvalidModelFile, NotFound) as error:
            return f"{error.message}; {error.hint}" if error.hint else error.message
        if found is not entry:
            async with self._changing:
                if self._entries.get(entry.model.name) is entry:
                    await self._store.save(entry.model.name, documents.write(found))
                    self._entries[entry.model.name] = found
                    self._tell()
        return None

    # -- small things -------------------------------------------------------------------------------------------

    def _checked(self, entry: Entry) -> Entry:
        """The entry if its file is as it was, or a new one if it may be used all the same. Blocking."""
        model = entry.model
        assert model.path is not None
        mark = _mark_of(Path(model.path))
        if mark is not None and mark == entry.mark:
            return entry
        if model.source is ModelSource.PACKAGED:
            path = packaged.verified(self._models_dir, self._package)
        elif mark is None:
            raise InvalidModelFile("missing", f"the file {model.path} is gone", hint="put it back or remove the model")
        else:
            path = Path(model.path)
        real, mark, header = _read_file(path)
        if header.shape != model.shape:
            raise InvalidModelFile(
                "changed", f"the file {model.path} is another one now", hint="remove the model and add it again"
            )
        return Entry(replace(model, path=real), mark)

    def _from_header(
        self,
        name: ModelName,
        source: ModelSource,
        path: str,
        header: GgufHeader,
        context_tokens: int | None,
        slots: int | None,
        replicas: int,
    ) -> Model:
        trained = header.shape.context_length_trained
        wanted = _bounded(
            "context_tokens", self._settings.models.context_tokens if context_tokens is None else context_tokens
        )
        note = ""
        if wanted > trained:
            asked = "asked for" if context_tokens is not None else "the default"
            note = f"context limited to {trained} tokens, which the model was trained for; {wanted} were {asked}"
        return Model(
            name=name,
            source=source,
            engine="llamacpp",
            context_tokens=min(wanted, trained),
            slots=_bounded("slots", self._settings.models.slots if slots is None else slots),
            replicas_wanted=_bounded("replicas", replicas),
            abilities=_abilities(gives_embeddings=header.gives_embeddings),
            path=path,
            shape=header.shape,
            added_at_s=self._clock.now_s(),
            note=note,
        )

    async def _add(self, entry: Entry) -> Model:
        model = entry.model
        async with self._changing:
            self._refuse_taken(model.name)
            if len(self._entries) >= MODELS_MAX:
                raise Conflict(f"there are {MODELS_MAX} models already", hint="remove one first")
            data = {"source": model.source.value, "path": model.path, "url": model.url, "slots": model.slots}
            data["context_tokens"] = model.context_tokens
            event = Event(EventKind.MODEL_ADDED, model.name, self._clock.now_s(), data)
            await self._store.save(model.name, documents.write(entry), event)
            self._entries[model.name] = entry
            self._tell()
        return model

    def _tell(self) -> None:
        self._models = {name: entry.model for name, entry in self._entries.items()}
        for callback in self._subscribers:
            callback()

    def _refuse_taken(self, name: str) -> None:
        if name in self._entries or name in self._broken:
            raise Conflict(
                f"there is a model {name!r} already",
                hint=f"choose another name, or remove it first: fleetmind models rm {name}",
                param="name",
            )

    def _unknown(self, name: str) -> ModelNotFound:
        shown = name[:200]
        close = near(shown, [*self._models, *self._broken])
        hint = f"did you mean {close[0]}?" if close else "list them: fleetmind models ls"
        return ModelNotFound(f"there is no model {shown!r}", hint=hint, param="model", near=close)


def near(name: str, names: list[str] | list[ModelName]) -> tuple[str, ...]:
    """The names closest to ``name``, best first, whatever their case."""
    by_folded = {candidate.casefold(): str(candidate) for candidate in sorted(names)}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=NEAR_MAX, cutoff=NEAR_CUTOFF)
    return tuple(by_folded[folded] for folded in found)


def slug(text: str) -> str:
    """A model name from the name of a file: ``"Qwen 2.5 (Q4_K_M)"`` becomes ``"qwen-2.5-q4_k_m"``."""
    cleaned = re.sub(r"[^a-z0-9._]+", "-", text.casefold())
    return cleaned.strip("-._")[:128] or "model"


def _checked_name(name: str) -> ModelName:
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:200]!r} can't be the name of a model",
            hint="use letters, digits, dots, dashes and underscores, at most 128, beginning with a letter or digit",
            param="name",
        )
    return ModelName(name)


FILE_OPTIONS: Mapping[str, tuple[bool | str, ...]] = {
    "embedding": (True,),
    "pooling": ("none", "mean", "cls", "last", "rank"),
}
"""What may be chosen for a file: to make vectors with a model that talks, and how tokens become one vector."""


def _check_file_options(options: Mapping[str, object]) -> None:
    for name, value in options.items():
        accepted = FILE_OPTIONS.get(name)
        if accepted is None:
            known = ", ".join(FILE_OPTIONS)
            raise InvalidRequest(f"there is no option {name!r} for a file; there are {known}", param="options")
        if not any(value is one or (isinstance(value, str) and value == one) for one in accepted):
            choices = ", ".join(map(json.dumps, accepted))
            raise InvalidRequest(f"the option {name} takes one of {choices}, not {value!r}", param="options")


def _abilities(*, gives_embeddings: bool) -> frozenset[Ability]:
    """llama.cpp does one or the other."""
    return frozenset({Ability.EMBEDDING} if gives_embeddings else {Ability.CHAT, Ability.COMPLETION})


_BOUNDS = {
    "context_tokens": (CONTEXT_TOKENS_MIN, CONTEXT_TOKENS_MAX),
    "slots": (1, SLOTS_MAX),
    "replicas": (0, REPLICAS_MAX),
}


def _bounded(param: str, value: int) -> int:
    least, most = _BOUNDS[param]
    if not least <= value <= most:
        raise InvalidRequest(f"{param} is {value}; {least} to {most} are possible", param=param)
    return value


def _checked_url(url: str) -> str:
    """The base URL, ending in /v1. Raises InvalidRequest; never repeats what might be a secret."""

    def refuse(why: str, hint: str = "give the base URL, for example http://10.0.0.2:8000/v1") -> InvalidRequest:
        return InvalidRequest(f"the URL {why}", hint=hint, param="url")

    if len(url) > URL_CHARS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise refuse(f"has characters that don't belong there, or more than {URL_CHARS_MAX}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise refuse(f"can't be read: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise refuse("must begin with http:// or https://")
    if "@" in parts.netloc:
        raise refuse("holds a user or password", "give the key by name of an environment variable: key_env")
    if not parts.hostname:
        raise refuse("has no host")
    if parts.query or parts.fragment:
        raise refuse("has a query or fragment", "a key doesn't belong there; name its environment variable: key_env")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _read_file(path: Path) -> tuple[str, FileMark, GgufHeader]:
    """Resolved path, mark and header of a model file. Blocking. The mark comes first: a change after it will show."""
    try:
        real = Path(path).expanduser().resolve()
        str(real).encode()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no home, NUL or bytes that aren't text
        raise InvalidModelFile("unreadable", f"{str(path)!r} is not a path that can be used: {error}") from error
    mark = _mark_of(real)
    header = read_header(real)
    if mark is None:
        raise InvalidModelFile("missing", f"there is no file {real}", hint="check the path")
    return str(real), mark, header


def _mark_of(path: Path) -> FileMark | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileMark(status.st_size, status.st_mtime_ns, status.st_ino)
