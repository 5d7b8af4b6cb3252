"""What ``fleetmind fit`` does where no server runs: the same questions, asked of this machine directly.

The answer has the shape of POST /api/fit, so that nobody need know who gave it.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

from fleetmind.core.clock import SystemClock
from fleetmind.core.config import load
from fleetmind.fleet.fit import fit
from fleetmind.fleet.gguf import read_header
from fleetmind.fleet.snapshot import DeviceView
from fleetmind.node.devices import open_devices


async def fit_here(path: Path, home: Path, *, context_tokens: int, slots: int) -> dict[str, Any]:
    """Judge the model file ``path`` on this machine's devices, or on the simulated ones that are configured.

    Raises InvalidModelFile, ConfigurationError.
    """
    settings = load(home, environ=os.environ, flags={}).settings
    shape = (await asyncio.to_thread(read_header, path)).shape
    reader = open_devices(settings.node, SystemClock())
    devices = await reader.find()
    readings = {reading.device_id: reading for reading in await reader.read()}
    views = [DeviceView(device, readings.get(device.id)) for device in devices]
    verdicts = fit(shape, views, context_tokens, slots, settings.fleet.reserve_bytes)
    footprint = verdicts[0].footprint
    return {
        "model": {
            "architecture": shape.architecture,
            "quantisation": shape.quantisation,
            "parameters": shape.parameters,
            "layers": shape.layers,
            "context_length_trained": shape.context_length_trained,
        },
        "footprint": {
            "weights_bytes": footprint.weights_bytes,
            "kv_bytes": footprint.kv_bytes,
            "compute_bytes": footprint.compute_bytes,
            "overhead_bytes": footprint.overhead_bytes,
            "total_bytes": footprint.total_bytes,
        },
        "devices": [
            {
                "id": verdict.device_id,
                "name": verdict.device_name,
                "is_simulated": verdict.is_simulated,
                "fits": verdict.fits,
                "memory_bytes_needed": verdict.memory_bytes_needed,
                "memory_bytes_free": verdict.memory_bytes_free,
                "context_tokens_max": verdict.context_tokens_max,
                "reason": verdict.reason,
            }
            for verdict in verdicts
        ],
    }
