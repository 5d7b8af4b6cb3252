"""What engines would start, and what they tell their processes."""

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import xllamacpp

from fleetmind.core.errors import ConfigurationError, EngineStartFailed
from fleetmind.core.settings import NodeSettings
from fleetmind.core.types import DeviceId, ModelName, ReplicaId
from fleetmind.node.engines import llama_server, llamacpp, registry
from fleetmind.node.engines.fake import Fake
from fleetmind.node.engines.llama_server import NEEDED, Capabilities, LlamaServer
from fleetmind.node.engines.llamacpp import LlamaCpp
from fleetmind.node.engines.remote import Remote
from fleetmind.node.protocol import Ability, Device, DeviceKind, Endpoint, ReplicaSpec

CPU = Device(DeviceId("cpu-1"), DeviceKind.CPU, "a processor", 1, cores=6)
CARDS = tuple(Device(DeviceId(f"GPU-{name}"), DeviceKind.CUDA, "a card", 1) for name in "ab")
SIMULATED = Device(DeviceId("card-0"), DeviceKind.CUDA, "a card", 1, is_simulated=True)
ENDPOINT = Endpoint("http://127.0.0.1:4321", "the-key")


def spec(**more: Any) -> ReplicaSpec:
    fields: dict[str, Any] = {
        "engine": "llamacpp",
        "device_ids": (),
        "context_tokens": 1000,
        "slots": 3,
        "path": "/m.gguf",
    }
    return ReplicaSpec(id=ReplicaId("r-1"), model=ModelName("a-model"), **(fields | more))


def embedded(wanted: ReplicaSpec, *devices: Device) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    command = LlamaCpp().command(wanted, devices, ENDPOINT)
    assert "the-key" not in " ".join([*command.argv, *command.env.values()])
    order = json.loads(command.stdin)
    assert order["api_key"] == "the-key"
    return order["parameters"], command.env


def test_the_processor_computes_with_its_cores_and_sees_no_card() -> None:
    parameters, env = embedded(spec(), CPU)
    assert parameters["n_ctx"] == 3000, "the total that the slots share"
    assert (parameters["n_parallel"], parameters["kv_unified"]) == (3, False)
    assert (parameters["n_gpu_layers"], parameters["cpuparams.n_threads"]) == (0, 6)
    assert (parameters["hostnames"], parameters["port"]) == (["127.0.0.1"], 4321)
    assert parameters["model_alias"] == ["a-model"]
    assert "embedding" not in parameters
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert int(env["GOMP_SPINCOUNT"]) <= 1000, "threads that spin for long starve each other on busy cores"


def test_cards_are_shown_by_uuid_and_take_all_layers() -> None:
    parameters, env = embedded(spec(), *CARDS)
    assert parameters["n_gpu_layers"] == -1
    assert env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}


def test_simulated_cards_compute_nothing() -> None:
    parameters, env = embedded(spec(), SIMULATED)
    assert parameters["n_gpu_layers"] == 0
    assert env["CUDA_VISIBLE_DEVICES"] == ""


def test_embedding_is_said_at_the_start() -> None:
    for wanted in (spec(options={"embedding": True}), spec(abilities=frozenset({Ability.EMBEDDING}))):
        parameters, _ = embedded(wanted, CPU)
        assert parameters["embedding"] is True
        assert parameters["n_batch"] == parameters["n_ubatch"] == 1000
    assert embedded(spec(options={"embedding": True, "pooling": "mean"}), CPU)[0]["pooling_type"].endswith("_MEAN")


def binary(*flags: str) -> LlamaServer:
    return LlamaServer("/usr/bin/llama-server", Capabilities("1", NEEDED | set(flags)))


def test_a_binary_gets_only_flags_it_knows_and_the_key_in_a_file() -> None:
    command = binary().command(spec(), [CPU], ENDPOINT)
    assert {part for part in command.argv if part.startswith("--")} == NEEDED
    assert command.argv[command.argv.index("--ctx-size") + 1] == "3000"
    assert command.argv[command.argv.index("--api-key-file") + 1] == "api-key"
    assert command.files == {"api-key": b"the-key\n"}
    assert "the-key" not in " ".join(command.argv)
    newer = binary("--no-ui", "--metrics", "--n-gpu-layers", "--fit").command(spec(), CARDS, ENDPOINT)
    assert {"--no-ui", "--metrics"} <= set(newer.argv)
    assert newer.argv[newer.argv.index("--n-gpu-layers") + 1] == "999"
    assert newer.argv[newer.argv.index("--fit") + 1] == "off"


def program(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


async def test_auto_passes_over_what_is_too_old_and_a_path_says_why(tmp_path: Path) -> None:
    old = program(tmp_path / "llama-server", "print('--model FNAME  model\\n--port N  port')")
    environ = {"PATH": str(tmp_path)}
    assert await llama_server.find("auto", environ) is None
    assert await llama_server.find("off", environ) is None
    assert await llama_server.find("auto", {"PATH": str(tmp_path / "empty")}) is None
    with pytest.raises(ConfigurationError, match="does not know --api-key-file, --ctx-size"):
        await llama_server.find(str(old), environ)
    with pytest.raises(ConfigurationError, match="no program at"):
        await llama_server.find(str(tmp_path / "nowhere"), environ)


async def test_a_binary_that_floods_or_fails_is_no_engine(tmp_path: Path) -> None:
    program(tmp_path / "llama-server", "import sys\nwhile True: sys.stdout.write('--model ' * 10000)")
    assert await llama_server.find("auto", {"PATH": str(tmp_path)}) is None


async def test_a_binary_learns_no_secret_when_asked(tmp_path: Path) -> None:
    path = program(tmp_path / "llama-server", "import os; print('version:', sorted(os.environ))")
    said = await llama_server.ask(str(path), {"PATH": os.defpath, "OPENAI_API_KEY": "secret"})
    assert "PATH" in said.version
    assert "OPENAI" not in said.version


async def test_the_registry_knows_each_engine_by_its_name() -> None:
    found = await registry.engines(NodeSettings(llama_server="off"), {})
    assert set(found) == {"llamacpp", "remote", "fake"}
    assert all(engine.facts.name == name for name, engine in found.items())
    assert isinstance(found["llamacpp"], LlamaCpp)
    assert [name for name, engine in found.items() if engine.facts.is_simulated] == ["fake"]
    assert [name for name, engine in found.items() if engine.facts.is_external] == ["remote"]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://api.example.org/v1", "https://api.example.org"),
        ("http://10.0.0.2:8000/v1/", "http://10.0.0.2:8000"),
        ("https://example.org/openai/v1", "https://example.org/openai"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
async def test_the_base_of_a_remote_server(url: str, base: str) -> None:
    endpoint = await Remote({"KEY": "k"}).endpoint(spec(url=url, key_env="KEY"))
    assert endpoint == Endpoint(base, "k")
    assert "k'" not in repr(endpoint)


@pytest.mark.parametrize("url", ["ftp://example.org/v1", "example.org/v1", "http://", "http://[::1", "", "file:///etc"])
async def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(EngineStartFailed, match="not an http"):
        await Remote({}).endpoint(spec(url=url))


def test_the_fake_engine_takes_slots_and_context_from_the_spec() -> None:
    order = json.loads(Fake().command(spec(options={"slots": 9}), [CPU], ENDPOINT).stdin)
    assert order["knobs"] == {"slots": 9, "context_tokens": 1000}
    assert order["api_key"] == "the-key"


async def test_what_the_embedded_build_computes_on_is_asked_not_assumed() -> None:
    facts = (await llamacpp.find(os.environ)).facts
    assert DeviceKind.CPU in facts.device_kinds
    assert (DeviceKind.CUDA in facts.device_kinds) == any("_GPU" in str(d["type"]) for d in xllamacpp.get_device_info())


@pytest.mark.parametrize(("listed", "kinds"), [("CUDA0: card", set(DeviceKind)), ("none", {DeviceKind.CPU})])
async def test_a_binary_says_which_devices_it_computes_on(tmp_path: Path, listed: str, kinds: set[DeviceKind]) -> None:
    flags = "\n".join(f"{flag} X    help" for flag in sorted(NEEDED | {"--list-devices"}))
    code = f"import sys\nprint({{'--help': {flags!r}, '--list-devices': '  {listed}'}}.get(sys.argv[1], 'version: 1'))"
    path = program(tmp_path / "llama-server", code)
    found = await llama_server.find(str(path), os.environ)
    assert found is not None
    assert found.facts.device_kinds == kinds
