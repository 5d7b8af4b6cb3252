"""Who may import whom, and what a pure module may know."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.tidy.sources import ROOT, modules

PURE = {
    "fleetmind.cli.banner",
    "fleetmind.cli.exits",
    "fleetmind.cli.views",
    "fleetmind.core.errors",
    "fleetmind.core.events",
    "fleetmind.core.settings",
    "fleetmind.core.types",
    "fleetmind.fleet.documents",
    "fleetmind.fleet.fit",
    "fleetmind.fleet.footprint",
    "fleetmind.fleet.ggml",
    "fleetmind.fleet.placement",
    "fleetmind.fleet.restarts",
    "fleetmind.fleet.shape",
    "fleetmind.fleet.snapshot",
    "fleetmind.fleet.statuses",
    "fleetmind.gateway.calls",
    "fleetmind.gateway.limits",
    "fleetmind.gateway.routing",
    "fleetmind.gateway.streaming",
    "fleetmind.node.engine",
    "fleetmind.node.engines.fake_knobs",
    "fleetmind.node.protocol",
    "fleetmind.node.pulse",
    "fleetmind.store.schema",
    "fleetmind.testing.model_files",
    "fleetmind.testing.snapshots",
}
"""The modules without clock, chance, files, network, log or loop: the same values in give the same values out."""

HARMLESS = {
    "bisect", "collections", "dataclasses", "datetime", "difflib", "enum", "functools", "itertools", "json", "math",
    "re", "shlex", "struct", "typing", "msgspec", "pydantic", "rich", "sqlalchemy",
}  # fmt: skip
"""What a pure module may use besides other pure ones."""

TIME_AND_CHANCE = {"time", "random", "secrets"}


def test_higher_packages_import_lower_ones_only() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_clock_reads_time_and_chance() -> None:
    readers = {
        module.name for module in modules() if TIME_AND_CHANCE & {name.split(".")[0] for name in module.imports()}
    }
    assert readers == {"fleetmind.core.clock"}


def test_pure_modules_are_those_that_say_so() -> None:
    claim = {module.name for module in modules() if any(claims_purity(line) for line in module.docstring.splitlines())}
    assert claim - PURE == set(), "add it to PURE, so that its imports are watched"
    assert {module.name for module in modules()} >= PURE


@pytest.mark.parametrize("name", sorted(PURE))
def test_a_pure_module_knows_only_pure_things(name: str) -> None:
    (module,) = (module for module in modules() if module.name == name)
    known = {one.name for one in modules()}
    foreign = {
        imported
        for imported in module.imports()
        if imported not in PURE
        and imported.rpartition(".")[0] not in PURE  # a name out of a pure module
        and imported.split(".")[0] not in HARMLESS
        and not (imported not in known and imported.rpartition(".")[0] in {"fleetmind.core.errors"})
    }
    assert {one for one in foreign if not any(pure.startswith(f"{one}.") for pure in PURE)} == set()
    assert "datetime.now" not in module.text
    assert "datetime.today" not in module.text


def claims_purity(line: str) -> bool:
    return line.startswith(("Pure.", "Pure:", "Pure values", "Pure but for pydantic", "Pure declarations"))
