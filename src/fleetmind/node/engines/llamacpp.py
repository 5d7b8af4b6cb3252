"""llama.cpp's server, embedded: one child process per replica, by way of xllamacpp.

Says which command serves a spec and how to read the server's answers; starts nothing itself. Invariant: bound to
loopback, with a key, with exactly the context asked for in each slot and no GPU but the ones given.

``n_ctx`` of llama.cpp is the total that ``n_parallel`` slots share: each gets n_ctx / n_parallel, rounded up to 256,
and at most what the model was trained for. (With ``kv_unified`` every slot would claim the whole, and calls would
fail when they really use it; so it is off.) Seen on xllamacpp 2026.10.11549.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fleetmind.core.errors import EngineStartFailed
from fleetmind.node.engine import Command, EngineFacts, Health, HealthState
from fleetmind.node.engines.asking import output_of
from fleetmind.node.engines.probing import Asker
from fleetmind.node.protocol import Ability, Device, DeviceKind, Endpoint, ReplicaSpec

CPU_ONLY = frozenset({DeviceKind.CPU})
CALLS_AHEAD = 1
"""llama.cpp takes a waiting call in the very step in which a slot becomes free. One that is handed over only then comes
a step or more later, while which the slot stands idle."""
_LIST_DEVICES = "import xllamacpp\nfor device in xllamacpp.get_device_info(): print(device['type'])"
CHILD = "fleetmind.node.engines.llamacpp_child"
CACHE_RAM_MIB = 0
"""llama.cpp may keep prompts of idle slots in up to 8 GiB of RAM, which placement knows nothing of: off."""

POLL = 0
"""Threads that wait for each other sleep instead of spinning. Where the cores are wanted by others too, and the
gateway is one, spinning costs most of the speed: 14 instead of 72 tokens/s were seen on two busy cores."""


SPIN_COUNT = 1000
"""The same for builds with libgomp, as the wheels for Linux are, which know nothing of POLL: how many rounds a thread
spins before it sleeps. libgomp takes this very number itself where there are more threads than cores, and 300 times as
much where it believes to be alone (see GOMP_SPINCOUNT in its manual). Two threads on two cores beside one busy program:
10 instead of 0.9 tokens/s; on idle cores no difference was seen."""


class LlamaCpp:
    """The embedded llama.cpp engine. ``device_kinds`` is what the installed build computes on; see ``find``."""

    def __init__(self, device_kinds: frozenset[DeviceKind] = CPU_ONLY) -> None:
        self._facts = EngineFacts(name="llamacpp", needs_file=True, device_kinds=device_kinds, calls_ahead=CALLS_AHEAD)

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        """The child that serves ``spec``. Raises EngineStartFailed when xllamacpp is not installed."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineStartFailed(
                "xllamacpp is not installed", hint="pip install xllamacpp, or put a llama-server on the PATH"
            )
        order = {"parameters": parameters(spec, devices, endpoint), "api_key": endpoint.api_key}
        return Command(
            argv=(sys.executable, "-P", "-m", CHILD),
            env=environment(devices),
            stdin=json.dumps(order).encode(),
        )

    async def endpoint(self, spec: ReplicaSpec) -> Endpoint | None:
        return None

    async def probe(self, endpoint: Endpoint, spec: ReplicaSpec) -> Health:
        return await probe(endpoint, spec)


async def find(environ: Mapping[str, str]) -> LlamaCpp:
    """The embedded engine, with what its build computes on: the package comes with and without support for GPUs."""
    listed = await output_of(environ, sys.executable, "-P", "-c", _LIST_DEVICES)
    return LlamaCpp(frozenset(DeviceKind) if "_GPU" in listed else CPU_ONLY)


def parameters(spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> dict[str, Any]:
    """Names and values of CommonParams for ``spec``; enumerations by the name of their member."""
    host, _, port = endpoint.base_url.removeprefix("http://").rpartition(":")
    chosen: dict[str, Any] = {
        "model.path": spec.path,
        "model_alias": [spec.model],
        "hostnames": [host],
        "port": int(port),
        "n_ctx": spec.context_tokens * spec.slots,
        "n_parallel": spec.slots,
        "kv_unified": False,
        "n_gpu_layers": -1 if uses_gpu(devices) else 0,
        "fit_params": False,  # placement has decided; shrinking the context silently would be a lie
        "cache_ram_mib": CACHE_RAM_MIB,
        "n_threads_http": http_threads(spec),
        "cpuparams.n_threads": threads(devices),
        "cpuparams.poll": POLL,
        "cpuparams_batch.n_threads": threads(devices),
        "cpuparams_batch.poll": POLL,
        "endpoint_metrics": True,
        "endpoint_slots": True,
        "endpoint_props": False,  # this one is about changing them; reading is always possible
        "ui": False,
        "offline": True,
        "cors_origins": "",
        "verbosity": 2,
    }
    if is_embedding(spec):
        chosen["embedding"] = True
        chosen["n_batch"] = chosen["n_ubatch"] = embedding_batch(spec)
        pooling = spec.options.get("pooling")
        if pooling is not None:
            chosen["pooling_type"] = f"LLAMA_POOLING_TYPE_{str(pooling).upper()}"
    return chosen


def is_embedding(spec: ReplicaSpec) -> bool:
    """Whether the replica shall make vectors; llama.cpp must be told when it starts."""
    return bool(spec.options.get("embedding", Ability.EMBEDDING in spec.abilities))


def embedding_batch(spec: ReplicaSpec) -> int:
    """Tokens of a batch when vectors are made: without causal order a whole prompt must fit one batch."""
    return max(512, min(spec.context_tokens, 8192))


def uses_gpu(devices: Sequence[Device]) -> bool:
    """Whether the work goes to real GPUs. What is placed on simulated ones runs on the processor."""
    return any(device.kind is DeviceKind.CUDA and not device.is_simulated for device in devices)


def environment(devices: Sequence[Device]) -> Mapping[str, str]:
    """Which devices a llama.cpp sees, and how its threads wait for each other."""
    return visible_devices(devices) | ({} if uses_gpu(devices) else {"GOMP_SPINCOUNT": str(SPIN_COUNT)})


def visible_devices(devices: Sequence[Device]) -> dict[str, str]:
    """The environment that shows a process exactly these GPUs, by UUID: indexes change when cards do."""
    uuids = [device.id for device in devices if device.kind is DeviceKind.CUDA and not device.is_simulated]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids)}


def threads(devices: Sequence[Device]) -> int:
    """Computing threads: the real cores of the processor given, few when GPUs do the work."""
    if uses_gpu(devices):
        return max(1, min(4, os.cpu_count() or 1))
    cores = max((device.cores for device in devices if device.kind is DeviceKind.CPU), default=0)
    return max(1, cores or os.cpu_count() or 1)


def http_threads(spec: ReplicaSpec) -> int:
    """A connection holds a thread of llama.cpp's HTTP server, also while it is kept open between calls."""
    return 2 * spec.slots + 8


async def probe(endpoint: Endpoint, spec: ReplicaSpec) -> Health:
    """Ask any llama.cpp server what it is and has."""
    async with Asker(endpoint.base_url, endpoint.api_key) as asker:
        health = await asker.get("/health")
        if health.status == 0:
            return Health(HealthState.UNREACHABLE, detail=health.fault)
        if health.status == 503:
            return Health(HealthState.LOADING, detail="loading the model")
        props = await asker.get("/props")
        if props.status in (401, 403):
            return Health(HealthState.FAILED, detail="the server refuses the key it was given")
        if health.status != 200 or props.status != 200:
            return Health(HealthState.UNREACHABLE, detail=f"answers {health.status} and {props.status}")
        if not is_embedding(spec):
            abilities = frozenset({Ability.CHAT, Ability.COMPLETION})
        else:  # 501 when it was not started for that; else it misses the input, at no cost
            vectors = await asker.post("/v1/embeddings", {})
            if vectors.status == 501:
                return Health(HealthState.FAILED, detail="the server makes no embeddings")
            abilities = frozenset({Ability.EMBEDDING})
    settings = props.body.get("default_generation_settings")
    return Health(
        HealthState.READY,
        slots=_number(props.body.get("total_slots")),
        context_tokens=_number(settings.get("n_ctx") if isinstance(settings, dict) else None),
        abilities=abilities,
        version=f"llama.cpp {props.body.get('build_info', '')}".strip(),
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
