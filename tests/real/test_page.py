"""The page on port 9200 in a real browser."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from tests.flow.service import running

CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000")  # fmt: skip

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is needed: apt-get install chromium")
        pytest.skip("Chromium is not installed: apt-get install chromium")
    return found


async def dom(browser: str, url: str, profile: Path) -> tuple[str, str]:
    """The page after its scripts have run, and what the browser's console said."""
    process = await asyncio.create_subprocess_exec(
        browser, *CHROMIUM, f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    console = [line for line in errors.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return out.decode(), "\n".join(console)


async def test_the_page_shows_the_live_fleet_to_who_has_a_key(tmp_path: Path, chromium: str) -> None:
    async with running(tmp_path / "home") as service:
        await service.add_fake("demo")
        page, console = await dom(chromium, f"{service.url}/#key={service.first_key}", tmp_path / "profile")
        assert "Ready: 1 of 1 models served." in page
        assert '<span id="simulated" class="badge warn">' in page  # shown: it is not marked hidden
        assert service.first_key not in page
        assert not console, console


async def test_without_a_key_the_page_shows_nothing_of_the_fleet(tmp_path: Path, chromium: str) -> None:
    async with running(tmp_path / "home") as service:
        await service.add_fake("hidden-model")
        for link in (service.url, f"{service.url}/#key=fm_wrong"):
            page, _ = await dom(chromium, link, tmp_path / "profile")
            assert "Locked: a key is needed." in page
            assert "hidden-model" not in page
