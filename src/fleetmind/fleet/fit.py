"""Does a model fit, where, and with how much context at most.

Pure. Per device one verdict with numbers and a sentence. Placement asks the same questions of the same functions, so
what ``fit`` promises is what placement does. It looks at what is free now and starts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fleetmind.core.types import DeviceId, format_bytes
from fleetmind.fleet.footprint import CACHE_CELLS_STEP, Footprint, estimate
from fleetmind.fleet.snapshot import DeviceView, ModelShape


@dataclass(frozen=True, slots=True)
class DeviceFit:
    """One device's verdict. ``context_tokens_max`` is the largest context a slot would fit with; 0 when none does.

    ``footprint`` is what it would take on this device; ``reason`` is for a person.
    """

    device_id: DeviceId
    device_name: str
    is_simulated: bool
    fits: bool
    memory_bytes_needed: int
    memory_bytes_free: int
    memory_bytes_total: int
    context_tokens_max: int
    footprint: Footprint
    reason: str


def fit(
    shape: ModelShape,
    devices: Sequence[DeviceView],
    context_tokens: int,
    slots: int,
    reserve_bytes: int,
    cache_type: str = "f16",
) -> tuple[DeviceFit, ...]:
    """A verdict for each of ``devices``, in their order, on ``shape`` with ``context_tokens`` for each of ``slots``."""
    return tuple(_fit_one(shape, view, context_tokens, slots, reserve_bytes, cache_type) for view in devices)


def _fit_one(
    shape: ModelShape, view: DeviceView, context_tokens: int, slots: int, reserve_bytes: int, cache_type: str
) -> DeviceFit:
    needed = estimate(shape, context_tokens, slots, cache_type, kind=view.device.kind)
    free = view.memory_bytes_free(reserve_bytes)
    largest = largest_context(shape, view, slots, reserve_bytes, cache_type)
    fault = device_fault(view)
    fits = fault is None and needed.total_bytes <= free
    if fault is not None:
        reason = fault
    elif fits:
        reason = f"takes {format_bytes(needed.total_bytes)} of {format_bytes(free)} free"
    else:
        reason = f"{shortfall(view, needed.total_bytes, reserve_bytes)}; {_advice(largest, slots)}"
    if context_tokens > shape.context_length_trained:
        reason += f"; the model was trained for {shape.context_length_trained} tokens"
    return DeviceFit(
        device_id=view.device.id,
        device_name=view.device.name,
        is_simulated=view.device.is_simulated,
        fits=fits,
        memory_bytes_needed=needed.total_bytes,
        memory_bytes_free=free,
        memory_bytes_total=view.device.memory_bytes_total,
        context_tokens_max=0 if fault is not None else largest,
        footprint=needed,
        reason=reason,
    )


def largest_context(
    shape: ModelShape, view: DeviceView, slots: int, reserve_bytes: int, cache_type: str = "f16"
) -> int:
    """The most tokens a slot may have on this device, up to what the model was trained for; 0 if none fits.

    Memory never shrinks with context and moves in steps of CACHE_CELLS_STEP, so halving finds it.
    """
    free = view.memory_bytes_free(reserve_bytes)
    trained = shape.context_length_trained

    def tokens(steps: int) -> int:
        return min(steps * CACHE_CELLS_STEP, trained)

    low, high = 0, -(-trained // CACHE_CELLS_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        if estimate(shape, tokens(middle), slots, cache_type, kind=view.device.kind).total_bytes <= free:
            low = middle
        else:
            high = middle - 1
    return tokens(low)


def device_fault(view: DeviceView) -> str | None:
    """Why nothing may go on this device; None when it is well."""
    if view.reading is None:
        return "it has not been read yet"
    if view.reading.fault is not None:
        return f"it can't be read: {view.reading.fault}"
    return None


def shortfall(view: DeviceView, needed_bytes: int, reserve_bytes: int, taken_bytes: int = 0) -> str:
    """``needs 1.2 GiB, 0.8 GiB free of 11.0 GiB after 256.0 MiB reserve``. ``taken_bytes`` are promised meanwhile."""
    free = view.memory_bytes_free(reserve_bytes) - taken_bytes
    return (
        f"needs {format_bytes(needed_bytes)}, {format_bytes(free)} free of "
        f"{format_bytes(view.device.memory_bytes_total)} after {format_bytes(reserve_bytes)} reserve"
    )


def _advice(largest: int, slots: int) -> str:
    if largest:
        return f"with {slots} slots a context of {largest} would fit"
    return "no context would fit; use fewer slots, a smaller quantisation or a device with more memory"
