"""Makers of models, devices, replicas and snapshots, for tests and simulations.

Every argument has a default that makes a healthy thing, so that a test names only what it is about. Pure.
"""

from collections.abc import Iterable, Mapping

from fleetmind.core.types import GIB, DeviceId, ModelName, ReplicaId
from fleetmind.fleet.snapshot import (
    DeviceView,
    FleetSnapshot,
    Model,
    ModelShape,
    ModelSource,
    ModelStatus,
    ReplicaView,
    snapshot,
)
from fleetmind.node.protocol import (
    Ability,
    Device,
    DeviceKind,
    DeviceProcess,
    DeviceReading,
    Endpoint,
    ReplicaReport,
    ReplicaSpec,
    ReplicaState,
)

AT_S = 1_800_000_000.0
TALKS = frozenset({Ability.CHAT, Ability.COMPLETION})


def make_shape(
    *, weights_bytes: int = GIB, layers: int = 16, heads: int = 8, key_length: int = 64, context: int = 8192
) -> ModelShape:
    """A dense model of the size of a small llama."""
    return ModelShape(
        architecture="llama",
        weights_bytes=weights_bytes,
        layers=layers,
        embedding_length=heads * key_length,
        kv_heads_per_layer=(heads,) * layers,
        key_length=key_length,
        value_length=key_length,
        vocabulary=32000,
        context_length_trained=context,
        quantisation="Q4_K_M",
        feed_forward_length=4 * heads * key_length,
        has_chat_template=True,
    )


def make_model(
    name: str = "model",
    *,
    source: ModelSource = ModelSource.FAKE,
    memory_bytes: int = GIB,
    replicas: int = 1,
    slots: int = 4,
    context_tokens: int = 4096,
    shape: ModelShape | None = None,
    added_at_s: float = AT_S,
) -> Model:
    """A catalogue entry: a fake one that claims ``memory_bytes``, a remote one, or a file of ``shape``."""
    engine = {ModelSource.FAKE: "fake", ModelSource.REMOTE: "remote"}.get(source, "llamacpp")
    is_file = source in (ModelSource.FILE, ModelSource.PACKAGED)
    return Model(
        name=ModelName(name),
        source=source,
        engine=engine,
        context_tokens=context_tokens,
        slots=slots,
        replicas_wanted=replicas,
        path=f"/models/{name}.gguf" if is_file else None,
        url="http://127.0.0.1:9/v1" if source is ModelSource.REMOTE else None,
        remote_model=name if source is ModelSource.REMOTE else None,
        shape=(shape or make_shape()) if is_file else None,
        options={"memory_bytes": memory_bytes} if source is ModelSource.FAKE else {},
        added_at_s=added_at_s,
    )


def make_device(
    device_id: str = "gpu-0",
    *,
    kind: DeviceKind = DeviceKind.CUDA,
    memory_bytes: int = 24 * GIB,
    is_simulated: bool = True,
) -> Device:
    """A device with a name after its id."""
    return Device(
        id=DeviceId(device_id),
        kind=kind,
        name=f"Test {device_id}",
        memory_bytes_total=memory_bytes,
        cores=8 if kind is DeviceKind.CPU else 0,
        is_simulated=is_simulated,
    )


def make_reading(
    device_id: str = "gpu-0",
    *,
    used: int = 0,
    utilisation: float | None = 0.0,
    temperature_c: float | None = 40.0,
    processes: tuple[DeviceProcess, ...] = (),
    fault: str | None = None,
    at_s: float = AT_S,
) -> DeviceReading:
    """What an idle, cool device says."""
    return DeviceReading(
        device_id=DeviceId(device_id),
        at_s=at_s,
        memory_bytes_used=used,
        utilisation=utilisation,
        temperature_c=temperature_c,
        processes=processes,
        fault=fault,
    )


def make_view(
    device_id: str = "gpu-0",
    *,
    kind: DeviceKind = DeviceKind.CUDA,
    memory_bytes: int = 24 * GIB,
    is_simulated: bool = True,
    granted: int = 0,
    foreign: int = 0,
    utilisation: float | None = 0.0,
    temperature_c: float | None = 40.0,
    fault: str | None = None,
) -> DeviceView:
    """A device as decisions see it."""
    return DeviceView(
        device=make_device(device_id, kind=kind, memory_bytes=memory_bytes, is_simulated=is_simulated),
        reading=make_reading(
            device_id, used=granted + foreign, utilisation=utilisation, temperature_c=temperature_c, fault=fault
        ),
        memory_bytes_granted=granted,
        memory_bytes_foreign=foreign,
    )


def make_replica(
    replica_id: str = "replica",
    model: str = "model",
    *,
    state: ReplicaState = ReplicaState.READY,
    devices: Iterable[str] = ("gpu-0",),
    memory_bytes: int = GIB,
    slots: int = 4,
    context_tokens: int = 4096,
    abilities: frozenset[Ability] = TALKS,
    base_url: str = "http://127.0.0.1:9",
    api_key: str = "",
    remote_model: str | None = None,
    created_at_s: float = AT_S,
    is_simulated: bool = True,
) -> ReplicaView:
    """A replica that serves, unless ``state`` says otherwise."""
    is_ready = state is ReplicaState.READY
    return ReplicaView(
        id=ReplicaId(replica_id),
        model=ModelName(model),
        state=state,
        device_ids=tuple(DeviceId(device_id) for device_id in devices),
        memory_bytes=memory_bytes,
        slots=slots,
        context_tokens=context_tokens,
        abilities=abilities,
        endpoint=Endpoint(base_url, api_key) if is_ready else None,
        remote_model=remote_model,
        created_at_s=created_at_s,
        ready_at_s=created_at_s if is_ready else None,
        is_simulated=is_simulated,
    )


def make_report(
    replica_id: str = "replica",
    model: str = "model",
    *,
    state: ReplicaState = ReplicaState.READY,
    devices: Iterable[str] = ("gpu-0",),
    memory_bytes: int = GIB,
    pid: int | None = None,
    reason: str = "",
    at_s: float = AT_S,
) -> ReplicaReport:
    """What a node would say of a replica."""
    spec = ReplicaSpec(
        id=ReplicaId(replica_id),
        model=ModelName(model),
        engine="fake",
        device_ids=tuple(DeviceId(device_id) for device_id in devices),
        context_tokens=4096,
        slots=4,
        memory_bytes=memory_bytes,
    )
    has_ended = state in (ReplicaState.STOPPED, ReplicaState.FAILED)
    return ReplicaReport(
        spec=spec,
        state=state,
        endpoint=Endpoint("http://127.0.0.1:9") if state is ReplicaState.READY else None,
        slots=spec.slots,
        context_tokens=spec.context_tokens,
        abilities=TALKS,
        created_at_s=at_s,
        ready_at_s=at_s if state is ReplicaState.READY else None,
        ended_at_s=at_s if has_ended else None,
        pid=pid,
        reason=reason,
        is_simulated=True,
    )


def make_snapshot(
    models: Iterable[Model] = (),
    devices: Iterable[DeviceView] = (),
    replicas: Iterable[ReplicaView] = (),
    *,
    statuses: Mapping[ModelName, ModelStatus] | None = None,
    version: int = 1,
    at_s: float = AT_S,
) -> FleetSnapshot:
    """A snapshot of these things."""
    return snapshot(
        version=version,
        at_s=at_s,
        devices=tuple(devices),
        models={model.name: model for model in models},
        replicas=tuple(replicas),
        statuses=statuses,
    )
