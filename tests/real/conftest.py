"""The packaged model, really served: once for all tests that ask it."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.flow.child import Child, running_apart

from fleetmind.fleet.packaged import SMOLLM2, locate

CONTEXT_TOKENS = 512


def needed(found: object, what: str, hint: str) -> None:
    """Skip with the reason where something is missing; in continuous integration, fail: there it must be."""
    if not found:
        if os.environ.get("CI"):
            pytest.fail(f"{what} is needed: {hint}")
        pytest.skip(f"{what} is missing: {hint}")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model's file."""
    found = locate(tmp_path_factory.mktemp("models"))
    needed(found, "the packaged model", "make install")
    return found[0]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def real(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> AsyncIterator[Child]:
    """A service as a user gets it, with the packaged model ready. Its context is small, so that one can exceed it."""
    home = tmp_path_factory.mktemp("real")
    async with running_apart(
        home,
        models__preload=SMOLLM2.model,
        models__context_tokens=str(CONTEXT_TOKENS),
        models__slots="2",
        node__probe_interval_s="2",
    ) as service:
        await service.until_state(SMOLLM2.model, "ready")
        yield service
