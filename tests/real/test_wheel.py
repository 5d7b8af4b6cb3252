"""The wheel, on a machine without make, Node, git or this checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from fleetmind import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "fleetmind"

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make wheel` builds it: by way of the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; what it depends on is lent by ours, to save minutes."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)], check=True, timeout=110
    )
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A plain path: files that make this checkout importable from there are not followed.
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def environment(binaries: Path, home: Path) -> dict[str, str]:
    """No make, no Node, no git, no checkout."""
    return {"PATH": str(binaries), "HOME": str(home), "FLEETMIND_HOME": str(home / "state"), "LANG": "C.UTF-8"}


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any("/static/" in name and name.endswith(".html") for name in names)
    assert any("/migrations/versions/" in name for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_its_command_runs_and_knows_its_version(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "fleetmind", "--version"],
        env=environment(installed, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"fleetmind {__version__}"


def test_it_serves_a_real_model_and_its_page(installed: Path, tmp_path: Path) -> None:
    def fleetmind(*arguments: str) -> str:
        command = [installed / "fleetmind", *arguments]
        done = subprocess.run(
            command, env=environment(installed, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=110,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    started = json.loads(fleetmind("up", "--detach", "--port", "0", "--json"))
    try:
        code = "import fleetmind; print(fleetmind.__file__)"
        python = [installed / "python", "-c", code]
        where = subprocess.run(
            python, env=environment(installed, tmp_path), cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert str(ROOT) not in where.stdout, "the checkout was used, not the wheel"
        assert started["models"] == ["smollm2-135m-instruct: ready"]
        assert len(fleetmind("ask", "Say hello.", "--max-tokens", "16")) > 1
        with urllib.request.urlopen(started["url"], timeout=30) as page:
            assert b"<html" in page.read()
    finally:
        fleetmind("down")
    assert os.path.isdir(tmp_path / "state")
