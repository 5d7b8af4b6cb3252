"""A frozen view of the fleet: models, devices, replicas, at one moment.

Pure. Every decision (placement, routing, later scaling) reads a FleetSnapshot and nothing else, so the same function
runs live, in simulation and in replay. A snapshot is never changed; the inventory makes a new one.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fleetmind.core.types import DeviceId, ModelName, ReplicaId
from fleetmind.node.protocol import Ability, Device, DeviceReading, Endpoint, ReplicaState


class ModelSource(StrEnum):
    """Where a model's weights are."""

    PACKAGED = "packaged"
    FILE = "file"
    REMOTE = "remote"
    FAKE = "fake"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the memory of a model depends on, read from its file's header. Sizes are bytes, lengths tokens or elements.

    ``kv_heads_per_layer`` has a zero for a layer that keeps no keys and values: a recurrent one, or one that shares
    another's. ``sliding_layers`` marks the layers that keep only the last ``sliding_window`` tokens; empty means none
    does. ``recurrent_state_bytes`` is what all recurrent layers together keep per slot, whatever the context.
    """

    architecture: str
    weights_bytes: int
    layers: int
    embedding_length: int
    kv_heads_per_layer: tuple[int, ...]
    key_length: int
    value_length: int
    vocabulary: int
    context_length_trained: int
    sliding_window: int = 0
    quantisation: str = ""
    parameters: int = 0
    has_chat_template: bool = False
    feed_forward_length: int = 0
    sliding_layers: tuple[bool, ...] = ()
    recurrent_state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of the catalogue: what a client may name, and how it is to be served.

    ``context_tokens`` is per slot. ``replicas_wanted`` is what the owner asked for. ``path`` and ``sha256`` belong to
    files, ``url``, ``remote_model`` and ``key_env`` to remote ones. ``note`` tells the owner where the entry differs
    from what was asked for.
    """

    name: ModelName
    source: ModelSource
    engine: str
    context_tokens: int
    slots: int
    replicas_wanted: int = 1
    abilities: frozenset[Ability] = frozenset({Ability.CHAT, Ability.COMPLETION})
    path: str | None = None
    sha256: str | None = None
    url: str | None = None
    remote_model: str | None = None
    key_env: str | None = None
    shape: ModelShape | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    added_at_s: float = 0.0
    note: str = ""


def serves_same(one: Model, other: Model) -> bool:
    """Whether a replica of ``one`` is also one of ``other``, however many are wanted and whatever is remarked."""
    return replace(one, replicas_wanted=0, note="") == replace(other, replicas_wanted=0, note="")


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device, its last reading, and how its memory is spoken for.

    ``memory_bytes_granted`` is what our replicas hold of it: for each the larger of what it was granted and what its
    process was measured to use. ``memory_bytes_foreign`` is what was measured to be in use and isn't ours. The two
    never overlap, so that nothing is counted twice.
    """

    device: Device
    reading: DeviceReading | None
    memory_bytes_granted: int = 0
    memory_bytes_foreign: int = 0

    def memory_bytes_free(self, reserve_bytes: int) -> int:
        """What a new replica may be granted: total - foreign - granted - reserve, never below zero."""
        taken = self.memory_bytes_foreign + self.memory_bytes_granted + reserve_bytes
        return max(0, self.device.memory_bytes_total - taken)


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as decisions see it. ``outstanding`` lives in the gateway, not here. ``calls_ahead`` calls may wait in
    the engine beyond its slots."""

    id: ReplicaId
    model: ModelName
    state: ReplicaState
    device_ids: tuple[DeviceId, ...]
    memory_bytes: int
    slots: int
    context_tokens: int
    abilities: frozenset[Ability]
    endpoint: Endpoint | None
    remote_model: str | None = None
    created_at_s: float = 0.0
    ready_at_s: float | None = None
    reason: str = ""
    is_simulated: bool = False
    calls_ahead: int = 0

    @property
    def calls_max(self) -> int:
        """Calls that may be sent to it at once."""
        return self.slots + self.calls_ahead


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Why a model has no ready replica, and for how long that should last.

    ``is_failed`` means waiting for it is in vain for now: it doesn't start, or fits nowhere.
    """

    reason: str
    retry_after_s: float
    is_failed: bool = False


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """The fleet at ``at_s`` (wall clock). ``version`` rises with every change of a model or replica, not of a reading.

    ``ready`` holds the replicas that may serve, per model; a model without one has its ModelStatus in ``statuses``.
    """

    version: int
    at_s: float
    devices: tuple[DeviceView, ...]
    models: Mapping[ModelName, Model]
    replicas: tuple[ReplicaView, ...]
    ready: Mapping[ModelName, tuple[ReplicaView, ...]]
    statuses: Mapping[ModelName, ModelStatus] = field(default_factory=dict)

    @property
    def is_simulated(self) -> bool:
        """Whether any device or replica here is simulated."""
        return any(view.device.is_simulated for view in self.devices) or any(r.is_simulated for r in self.replicas)


def snapshot(
    *,
    version: int,
    at_s: float,
    devices: tuple[DeviceView, ...],
    models: Mapping[ModelName, Model],
    replicas: tuple[ReplicaView, ...],
    statuses: Mapping[ModelName, ModelStatus] | None = None,
    outdated: Set[ReplicaId] = frozenset(),
) -> FleetSnapshot:
    """A snapshot with its index of ready replicas. The one way to make one.

    ``outdated`` replicas are of a model that has gone or changed, whatever has its name now: they get no new calls.
    """
    ready: dict[ModelName, tuple[ReplicaView, ...]] = {}
    for replica in replicas:
        if replica.state is ReplicaState.READY and replica.endpoint is not None and replica.id not in outdated:
            ready[replica.model] = (*ready.get(replica.model, ()), replica)
    return FleetSnapshot(version, at_s, devices, dict(models), replicas, ready, dict(statuses or {}))
