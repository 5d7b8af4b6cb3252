"""llama.cpp's own ``llama-server``, when there is one: preferred, as it is built for this machine.

What the binary can do is read from its ``--help`` and ``--list-devices``, not assumed: only flags it knows are given.
Invariant: the key reaches it by a file of mode 0600, never by its arguments or environment.
"""

import asyncio
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fleetmind.core.errors import ConfigurationError
from fleetmind.node.engine import Command, EngineFacts, Health
from fleetmind.node.engines import llamacpp
from fleetmind.node.engines.asking import output_of
from fleetmind.node.protocol import Device, DeviceKind, Endpoint, ReplicaSpec

NAME = "llama-server"
KEY_FILE = "api-key"
LIST_DEVICES = "--list-devices"
NEEDED = frozenset({"--model", "--host", "--port", "--ctx-size", "--parallel", "--api-key-file"})


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a binary said of itself."""

    version: str
    flags: frozenset[str]
    device_kinds: frozenset[DeviceKind] = frozenset(DeviceKind)


class LlamaServer:
    """The engine ``llamacpp`` by way of a binary."""

    def __init__(self, path: str, capabilities: Capabilities) -> None:
        self.path = path
        self.capabilities = capabilities

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            name="llamacpp",
            needs_file=True,
            device_kinds=self.capabilities.device_kinds,
            calls_ahead=llamacpp.CALLS_AHEAD,
        )

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        """The binary with the flags it knows; the same choices as for the embedded engine."""
        flags = [flag for name, flag in self._flags(spec, devices, endpoint) if name in self.capabilities.flags]
        return Command(
            argv=(self.path, *(part for flag in flags for part in flag)),
            env=llamacpp.environment(devices),
            files={KEY_FILE: endpoint.api_key.encode() + b"\n"},
        )

    async def endpoint(self, spec: ReplicaSpec) -> Endpoint | None:
        return None

    async def probe(self, endpoint: Endpoint, spec: ReplicaSpec) -> Health:
        return await llamacpp.probe(endpoint, spec)

    def _flags(
        self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint
    ) -> list[tuple[str, tuple[str, ...]]]:
        host, _, port = endpoint.base_url.removeprefix("http://").rpartition(":")
        pairs = {
            "--model": str(spec.path),
            "--alias": spec.model,
            "--host": host,
            "--port": port,
            "--ctx-size": str(spec.context_tokens * spec.slots),
            "--parallel": str(spec.slots),
            "--n-gpu-layers": "999" if llamacpp.uses_gpu(devices) else "0",
            "--threads": str(llamacpp.threads(devices)),
            "--poll": str(llamacpp.POLL),
            "--threads-http": str(llamacpp.http_threads(spec)),
            "--cache-ram": str(llamacpp.CACHE_RAM_MIB),
            "--fit": "off",
            "--api-key-file": KEY_FILE,
        }
        alone = ["--metrics", "--slots", "--offline", "--no-kv-unified"]
        alone.append("--no-ui" if "--no-ui" in self.capabilities.flags else "--no-webui")
        if llamacpp.is_embedding(spec):
            batch = str(llamacpp.embedding_batch(spec))
            pairs |= {"--batch-size": batch, "--ubatch-size": batch}
            alone.append("--embeddings" if "--embeddings" in self.capabilities.flags else "--embedding")
            if spec.options.get("pooling"):
                pairs["--pooling"] = str(spec.options["pooling"])
        return [(name, (name, value)) for name, value in pairs.items()] + [(name, (name,)) for name in alone]


async def find(setting: str, environ: Mapping[str, str]) -> LlamaServer | None:
    """The binary that ``setting`` (auto, off or a path) means; None when there is none to use.

    Raises ConfigurationError when a path was given and what is there is no usable llama-server. With auto, a binary
    that is too old is passed over.
    """
    if setting == "off":
        return None
    is_auto = setting == "auto"
    path = shutil.which(NAME if is_auto else setting, path=environ.get("PATH", os.defpath))
    if path is None:
        if is_auto:
            return None
        raise ConfigurationError(f"there is no program at {setting}", param="node.llama_server")
    capabilities = await ask(path, environ)
    missing = sorted(NEEDED - capabilities.flags)
    if missing:
        if is_auto:
            return None
        raise ConfigurationError(
            f"{path} is not a usable llama-server: it does not know {', '.join(missing)}",
            hint="update it, or set node.llama_server to off",
            param="node.llama_server",
        )
    return LlamaServer(path, capabilities)


async def ask(path: str, environ: Mapping[str, str]) -> Capabilities:
    """What the binary at ``path`` says of itself; nothing when it does not answer as one should."""
    version, help_text = await asyncio.gather(output_of(environ, path, "--version"), output_of(environ, path, "--help"))
    found = re.search(r"version:\s*(\S.*)", version)
    flags = frozenset(flag for line in help_text.splitlines() for flag in _flags_of(line))
    kinds = frozenset(DeviceKind)
    if LIST_DEVICES in flags:
        listed = await output_of(environ, path, LIST_DEVICES)
        kinds = frozenset(DeviceKind) if re.search(r"^\s*CUDA\d+:", listed, re.MULTILINE) else llamacpp.CPU_ONLY
    return Capabilities(found[1].strip() if found else "", flags, kinds)


def _flags_of(line: str) -> list[str]:
    """The flags that a line of the help introduces, as in ``-c,    --ctx-size N    size of the prompt context``."""
    head = re.match(r"\s{0,4}(-{1,2}[\w-]+(?:,\s*-{1,2}[\w-]+)*)", line)
    return re.findall(r"-{1,2}[\w-]+", head[1]) if head else []
