"""What happened, as data: the entries of the journal.

Pure. An event is written once and never changed; its ``kind`` is one of the names below, so that a reader can match
on it. Secrets never enter an event.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class EventKind(StrEnum):
    """The names of what can happen. Adding one is compatible; renaming one is not."""

    SERVER_STARTED = "server.started"
    SERVER_STOPPED = "server.stopped"
    MODEL_ADDED = "model.added"
    MODEL_REMOVED = "model.removed"
    REPLICA_STARTING = "replica.starting"
    REPLICA_READY = "replica.ready"
    REPLICA_FAILED = "replica.failed"
    REPLICA_STOPPED = "replica.stopped"
    PLACEMENT_PLANNED = "placement.planned"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    KEY_SHOWN = "key.shown"
    ORPHAN_ENDED = "orphan.ended"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``subject`` is the id of what it happened to; ``data`` must be plain JSON."""

    kind: EventKind
    subject: str
    at_s: float
    data: Mapping[str, object] = field(default_factory=dict)
