"""The official OpenAI client for Node against the packaged model."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.flow.child import Child
from tests.real.conftest import needed

from fleetmind.fleet.packaged import SMOLLM2

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="session")]

FOLDER = Path(__file__).parent / "node"
NODE_MAJOR_MIN = 20
INSTALL_S_MAX = 100
RUN_S_MAX = 110


@pytest.fixture(scope="session")
def node() -> str:
    """Node with the client installed exactly as it is locked; nothing of the package is run to install it."""
    found, npm = shutil.which("node"), shutil.which("npm")
    needed(found and npm, "Node", f"install Node {NODE_MAJOR_MIN} or newer, with npm")
    assert found is not None
    assert npm is not None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    is_new_enough = int(version.strip().removeprefix("v").partition(".")[0]) >= NODE_MAJOR_MIN
    needed(is_new_enough, f"Node {NODE_MAJOR_MIN}", f"here is {version.strip()}")
    lock = (FOLDER / "package-lock.json").read_text()
    stamp = FOLDER / "node_modules" / ".locked"
    if not stamp.is_file() or stamp.read_text() != lock:
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
        needed(done.returncode == 0, "the client's package", done.stderr[-500:])
        stamp.write_text(lock)
    return found


async def run(node: str, real: Child, scenario: str) -> dict[str, Any]:
    """What the client saw in ``scenario``."""
    assert real.first_key is not None
    process = await asyncio.create_subprocess_exec(
        node, str(FOLDER / "client.mjs"), scenario,
        env=os.environ | {
            "FLEETMIND_URL": real.url, "FLEETMIND_KEY": real.first_key, "FLEETMIND_MODEL": SMOLLM2.model,
        },
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(RUN_S_MAX):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, errors.decode(errors="replace")[-3000:]
    return dict(json.loads(out))


async def test_chat_and_stream_say_the_same(node: str, real: Child) -> None:
    chat, stream = await run(node, real, "chat"), await run(node, real, "stream")
    assert "Paris" in chat["text"]
    assert chat["model"] == SMOLLM2.model
    assert stream["text"] == chat["text"]
    assert stream["pieces"] > 3
    assert stream["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"] > 0


async def test_a_stream_that_is_left_frees_its_slot(node: str, real: Child) -> None:
    assert (await run(node, real, "abandon"))["aborted"]
    await real.until_calls(outstanding=0)


async def test_the_list_of_models(node: str, real: Child) -> None:
    seen = await run(node, real, "models")
    assert seen["one"] == SMOLLM2.model
    assert SMOLLM2.model in seen["names"]


async def test_refusals_are_the_errors_the_client_knows(node: str, real: Child) -> None:
    seen = await run(node, real, "errors")
    assert {name: (error["kind"], error["status"], error["code"]) for name, error in seen.items()} == {
        "model": ("NotFoundError", 404, "model_not_found"),
        "key": ("AuthenticationError", 401, "invalid_api_key"),
        "value": ("BadRequestError", 400, "invalid_value"),
        "context": ("BadRequestError", 400, "context_length_exceeded"),
        "vectors": ("BadRequestError", 400, "invalid_value"),
    }
    assert seen["model"]["near"] == [SMOLLM2.model]
    assert seen["value"]["param"] == "max_tokens"
