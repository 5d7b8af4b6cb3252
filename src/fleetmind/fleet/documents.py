"""How a catalogue entry is written down and read back.

The edge between our frozen values and the JSON of the store. Pure but for pydantic. The invariant: what ``write``
makes, ``read`` gives back equal; anything else is a ValueError with words, never half an entry.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fleetmind.core.types import ModelName
from fleetmind.fleet.snapshot import Model

FORMAT = 1
"""Rises when a document is written that older servers can't read."""


@dataclass(frozen=True, slots=True)
class FileMark:
    """What tells cheaply that a file is still the one that was read. Not its content: that is for the hash."""

    size_bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A model and, for one with a file, the mark the file had when it was last read or verified."""

    model: Model
    mark: FileMark | None = None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int
    entry: dict[str, Any]


_ENTRY = TypeAdapter(Entry)


def write(entry: Entry) -> dict[str, Any]:
    """The document of an entry: plain JSON."""
    return {"format": FORMAT, "entry": _ENTRY.dump_python(entry, mode="json")}


def read(name: str, document: object) -> Entry:
    """The entry of a document. ValueError says what is wrong with it, in one line."""
    try:
        envelope = _Document.model_validate(document)
        if envelope.format != FORMAT:
            raise ValueError(f"it was written by another version (format {envelope.format}, here {FORMAT})")
        entry = _ENTRY.validate_python(envelope.entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from error
    if entry.model.name != ModelName(name):
        raise ValueError(f"it is about {entry.model.name!r}")
    return entry
