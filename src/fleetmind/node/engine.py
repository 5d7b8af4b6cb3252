"""How one inference server is started and judged.

Facts are data; the wire format is not our business here. An engine never starts a process itself: it says which
command would, and the daemon runs it. A new engine is one module in ``engines/``, one line in
``engines/registry.py``, and passes ``testing.contracts.check_engine``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from fleetmind.node.protocol import Ability, Device, DeviceKind, Endpoint, ReplicaSpec


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known of an engine before it runs.

    ``needs_file`` and ``needs_url`` say what a replica must carry; ``is_external`` means there is no process of ours;
    ``is_simulated`` means answers are invented and must be labelled so wherever a person sees them. ``device_kinds`` is
    what it can compute on, as found out on this machine. ``calls_ahead`` is how many calls may wait inside it beyond
    its slots, so that a slot that becomes free has the next one at once.
    """

    name: str
    needs_file: bool = False
    needs_url: bool = False
    is_external: bool = False
    is_simulated: bool = False
    device_kinds: frozenset[DeviceKind] = frozenset(DeviceKind)
    calls_ahead: int = 0


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start. ``stdin`` is written once and closed; secrets travel there or in ``files`` (mode 0600, paths
    relative to the replica's own directory), never in ``argv`` or ``env``."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)


class HealthState(StrEnum):
    """What a probe saw."""

    LOADING = "loading"
    READY = "ready"
    UNREACHABLE = "unreachable"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Health:
    """What a probe saw; the capabilities hold only when ``state`` is ready. ``detail`` is for a person."""

    state: HealthState
    slots: int = 0
    context_tokens: int = 0
    abilities: frozenset[Ability] = frozenset()
    version: str = ""
    detail: str = ""


class Engine(Protocol):
    """One kind of inference server."""

    @property
    def facts(self) -> EngineFacts: ...

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        """The process that would serve ``spec`` at ``endpoint``. Not called for an external engine."""
        ...

    async def endpoint(self, spec: ReplicaSpec) -> Endpoint | None:
        """Where an external engine answers; None for one whose process the daemon starts on a port of its choosing."""
        ...

    async def probe(self, endpoint: Endpoint, spec: ReplicaSpec) -> Health:
        """Ask the server what it is and has. Never raises for a server that is down: that is UNREACHABLE."""
        ...
