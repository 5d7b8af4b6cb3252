"""What the control plane and a node say to each other.

Pure values: devices and their readings, what a replica shall be, and what it was seen to be. A node executes; it
never decides what runs where. States of a replica change only along TRANSITIONS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fleetmind.core.types import DeviceId, ModelName, ReplicaId


class DeviceKind(StrEnum):
    """What computes."""

    CPU = "cpu"
    CUDA = "cuda"


class Ability(StrEnum):
    """What a model on an engine can be asked for."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Device:
    """Something with memory that models can live on.

    ``id`` is stable across restarts: the GPU's UUID, ``cpu-<machine>`` for the processor, the name given in the file
    for a simulated device. ``memory_bytes_total`` is VRAM for a GPU and RAM for the processor.
    """

    id: DeviceId
    kind: DeviceKind
    name: str
    memory_bytes_total: int
    index: int = 0
    cores: int = 0
    is_simulated: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process holding memory of a device; ours or foreign."""

    pid: int
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """What a device looked like at ``at_s`` (wall clock). None means the device doesn't say, never zero.

    ``utilisation`` is a share from 0 to 1, ``temperature_c`` degrees Celsius, ``power_w`` watts. ``fault`` is why the
    device could not be read; then the other values are from before.
    """

    device_id: DeviceId
    at_s: float
    memory_bytes_used: int
    utilisation: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    processes: tuple[DeviceProcess, ...] = ()
    fault: str | None = None


class ReplicaState(StrEnum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.STARTING: frozenset({ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.FAILED}),
    ReplicaState.READY: frozenset({ReplicaState.DRAINING, ReplicaState.FAILED}),
    ReplicaState.DRAINING: frozenset({ReplicaState.STOPPED, ReplicaState.FAILED}),
    ReplicaState.STOPPED: frozenset(),
    ReplicaState.FAILED: frozenset(),
}
"""Which state may follow which. A failed replica is never revived: reconcile starts another with an id of its own."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One wanted replica: a model on devices, served by an engine.

    ``path`` is the model file of an embedded engine; ``url`` the base (ending in ``/v1``) of a remote one, whose name
    for the model is ``remote_model`` and whose key, if any, is in the environment variable ``key_env``.
    ``context_tokens`` is per slot. ``memory_bytes`` is what placement granted. ``options`` are the engine's own knobs.
    """

    id: ReplicaId
    model: ModelName
    engine: str
    device_ids: tuple[DeviceId, ...]
    context_tokens: int
    slots: int
    memory_bytes: int = 0
    path: str | None = None
    url: str | None = None
    remote_model: str | None = None
    key_env: str | None = None
    abilities: frozenset[Ability] = frozenset({Ability.CHAT, Ability.COMPLETION})
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a replica answers. ``base_url`` has no trailing slash and no ``/v1``. The key never shows in a repr."""

    base_url: str
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica as the node sees it now.

    ``reason`` says why it failed or what it is waiting for. ``slots``, ``context_tokens`` and ``abilities`` are what
    the engine was probed to have once ready, and what was asked for before that. Times are wall clock.
    """

    spec: ReplicaSpec
    state: ReplicaState
    endpoint: Endpoint | None
    slots: int
    context_tokens: int
    abilities: frozenset[Ability]
    created_at_s: float
    ready_at_s: float | None = None
    ended_at_s: float | None = None
    pid: int | None = None
    engine_version: str = ""
    reason: str = ""
    is_simulated: bool = False
