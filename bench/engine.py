"""An engine asked directly: the same child, with the same parameters, that Fleetmind starts for its replicas.

It runs beside Fleetmind's own replica and is asked in turns with it, so that the difference is the way through
Fleetmind and nothing else.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.processes import Running, answers, free_port
from fleetmind.core.clock import SystemClock, secret_token
from fleetmind.core.settings import NodeSettings
from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.node.devices import open_devices
from fleetmind.node.engine import Engine
from fleetmind.node.engines.fake import Fake
from fleetmind.node.engines.llamacpp import LlamaCpp
from fleetmind.node.protocol import Device, DeviceKind, Endpoint, ReplicaSpec

START_S_MAX = 60.0


class Direct:
    """A running engine, its port and its key."""

    def __init__(self, running: Running, port: int, key: str) -> None:
        self.running = running
        self.port = port
        self.key = key


def start(engine: Engine, spec: ReplicaSpec, folder: Path) -> Direct:
    """Start what ``engine`` would start for ``spec`` on this machine's processor. Raises NotMeasured."""
    port, key = free_port(), secret_token(24).hex()
    endpoint = Endpoint(f"http://127.0.0.1:{port}", key)
    command = engine.command(spec, _processors(), endpoint)
    running = Running(
        f"{engine.facts.name} asked directly",
        command.argv,
        log=folder / f"direct-{engine.facts.name}.log",
        env=command.env,
        cwd=folder,
        stdin=command.stdin,
    )
    try:
        running.wait_until(answers(port, "/health", key=key), within_s=START_S_MAX)
    except BaseException:
        running.stop()
        raise
    return Direct(running, port, key)


def _processors() -> Sequence[Device]:
    """This machine's processor as Fleetmind sees it: the number of threads follows from it."""
    devices = asyncio.run(open_devices(NodeSettings(), SystemClock()).find())
    return [device for device in devices if device.kind is DeviceKind.CPU]


def start_llamacpp(model: Mapping[str, object], folder: Path) -> Direct:
    """The twin of a replica of ``model``, as the management API shows it."""
    return start(LlamaCpp(), _spec(model, "llamacpp", path=str(model["path"])), folder)


def start_fake(model: Mapping[str, object], options: Mapping[str, object], folder: Path) -> Direct:
    """The twin of a replica of a fake model with these knobs."""
    return start(Fake(), _spec(model, "fake", options=options), folder)


def _spec(
    model: Mapping[str, object], engine: str, *, path: str | None = None, options: Mapping[str, object] | None = None
) -> ReplicaSpec:
    return ReplicaSpec(
        id=ReplicaId("direct"),
        model=ModelName(str(model["name"])),
        engine=engine,
        device_ids=(),
        context_tokens=int(str(model["context_tokens"])),
        slots=int(str(model["slots"])),
        path=path,
        options=options or {},
    )
