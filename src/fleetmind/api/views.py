"""Snapshots and reports as the api shows them: frozen values in, schemas out. Reads no clock and asks nobody."""

from collections.abc import Collection, Mapping

from fleetmind.api import schemas
from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.fleet.fit import DeviceFit
from fleetmind.fleet.footprint import Footprint
from fleetmind.fleet.placement import PlacementPlan
from fleetmind.fleet.snapshot import DeviceView, FleetSnapshot, Model, ModelSource
from fleetmind.node.protocol import ReplicaReport, ReplicaState
from fleetmind.store.keys import KeyRecord


def device(view: DeviceView, now_s: float, our_pids: Collection[int]) -> schemas.DeviceOut:
    """A device with its reading's age and whose memory is whose."""
    reading = view.reading
    return schemas.DeviceOut(
        id=view.device.id,
        kind=view.device.kind,
        name=view.device.name,
        is_simulated=view.device.is_simulated,
        memory_bytes_total=view.device.memory_bytes_total,
        memory_bytes_used=reading.memory_bytes_used if reading else None,
        memory_bytes_granted=view.memory_bytes_granted,
        utilisation=reading.utilisation if reading else None,
        temperature_c=reading.temperature_c if reading else None,
        power_w=reading.power_w if reading else None,
        fault=reading.fault if reading else None,
        reading_age_s=max(0.0, now_s - reading.at_s) if reading else None,
        processes=[
            schemas.ProcessOut(pid=p.pid, name=p.name, memory_bytes=p.memory_bytes, is_ours=p.pid in our_pids)
            for p in (reading.processes if reading else ())
        ],
    )


def model(entry: Model, fleet: FleetSnapshot) -> schemas.ModelOut:
    """A catalogue entry with its state in words."""
    ready = len(fleet.ready.get(entry.name, ()))
    status = fleet.statuses.get(entry.name)
    state, reason = model_state(entry.name, fleet)
    return schemas.ModelOut(
        name=entry.name,
        source=entry.source,
        engine=entry.engine,
        state=state,
        reason=reason if status is None or ready else status.reason,
        context_tokens=entry.context_tokens,
        slots=entry.slots,
        replicas_wanted=entry.replicas_wanted,
        replicas_ready=ready,
        path=entry.path,
        url=entry.url,
        weights_bytes=entry.shape.weights_bytes if entry.shape else None,
        quantisation=(entry.shape.quantisation or None) if entry.shape else None,
        abilities=sorted(entry.abilities),
        is_simulated=entry.source is ModelSource.FAKE,
    )


def model_state(name: ModelName, fleet: FleetSnapshot) -> tuple[schemas.ModelState, str]:
    """Whether a model is served, and what it waits for if not."""
    if name in fleet.ready:
        return "ready", ""
    status = fleet.statuses.get(name)
    if status is not None and status.is_failed:
        return "failed", status.reason
    for replica in fleet.replicas:
        if replica.model == name and replica.state is ReplicaState.STARTING:
            return "loading", replica.reason or "The engine is loading the model."
    return "unplaced", status.reason if status else "No replica has been started yet."


def replica(report: ReplicaReport, outstanding: Mapping[ReplicaId, int]) -> schemas.ReplicaOut:
    """A replica as its node saw it. Its key is never shown."""
    return schemas.ReplicaOut(
        id=report.spec.id,
        model=report.spec.model,
        state=report.state,
        devices=list(report.spec.device_ids),
        memory_bytes=report.spec.memory_bytes,
        slots=report.slots,
        context_tokens=report.context_tokens,
        pid=report.pid,
        url=report.endpoint.base_url if report.endpoint else None,
        reason=report.reason,
        created_at_s=report.created_at_s,
        ready_at_s=report.ready_at_s,
        outstanding=outstanding.get(report.spec.id, 0),
        is_simulated=report.is_simulated,
    )


def key(record: KeyRecord) -> schemas.KeyOut:
    """A key without its text."""
    return schemas.KeyOut(
        id=record.id,
        name=record.name,
        scopes=sorted(record.scopes),
        models=sorted(record.models),
        created_at_s=record.created_at_s,
        expires_at_s=record.expires_at_s,
        revoked_at_s=record.revoked_at_s,
        last_used_at_s=record.last_used_at_s,
    )


def device_fit(verdict: DeviceFit) -> schemas.DeviceFitOut:
    """Whether a model fits on a device, with the numbers."""
    return schemas.DeviceFitOut(
        id=verdict.device_id,
        name=verdict.device_name,
        is_simulated=verdict.is_simulated,
        fits=verdict.fits,
        memory_bytes_needed=verdict.memory_bytes_needed,
        memory_bytes_free=verdict.memory_bytes_free,
        context_tokens_max=verdict.context_tokens_max,
        reason=verdict.reason,
    )


def footprint(parts: Footprint) -> schemas.FootprintOut:
    """Memory a model needs, by what needs it."""
    return schemas.FootprintOut(
        weights_bytes=parts.weights_bytes,
        kv_bytes=parts.kv_bytes,
        compute_bytes=parts.compute_bytes,
        overhead_bytes=parts.overhead_bytes,
        total_bytes=parts.total_bytes,
    )


def placement(plan: PlacementPlan | None, at_s: float) -> schemas.PlacementOut:
    """The last plan; empty before the first."""
    if plan is None:
        return schemas.PlacementOut(at_s=at_s, starts=[], stops=[], refusals=[])
    return schemas.PlacementOut(
        at_s=at_s,
        starts=[
            schemas.StartOut(
                model=start.model, devices=list(start.device_ids), memory_bytes=start.memory_bytes, reason=start.reason
            )
            for start in plan.start
        ],
        stops=[schemas.StopOut(replica=stop.replica_id, reason=stop.reason) for stop in plan.stop],
        refusals=[
            schemas.RefusalOut(
                model=refusal.model,
                device=refusal.device_id,
                code=refusal.code,
                message=refusal.message,
                memory_bytes_needed=refusal.memory_bytes_needed,
                memory_bytes_free=refusal.memory_bytes_free,
            )
            for refusal in plan.refusals
        ],
    )
