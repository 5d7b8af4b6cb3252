"""Migrations: what they make is what statements expect, and a normal start doesn't pay for them."""

import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

import fleetmind.store
from fleetmind.core.errors import StoreError
from fleetmind.store import upgrade
from fleetmind.store.database import Database
from fleetmind.store.models import Models
from fleetmind.store.schema import metadata

MIGRATIONS = Path(fleetmind.store.__path__[0]) / "migrations"


def test_the_revision_in_code_is_the_newest_migration() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [upgrade.REVISION]


async def test_migrations_make_the_tables_that_statements_expect() -> None:
    database = await Database.open("sqlite://")
    differences = await database.write(
        lambda connection: compare_metadata(MigrationContext.configure(connection), metadata)
    )
    await database.close()
    assert differences == []


def test_a_normal_start_imports_no_alembic(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from fleetmind.store.database import Database\n"
        "assert 'alembic' not in sys.modules, 'importing the store imports alembic'\n"
        "async def main():\n"
        "    await (await Database.open(sys.argv[1])).close()\n"
        "asyncio.run(main())\n"
        "print('alembic' in sys.modules, 'pg8000' in sys.modules, 'opentelemetry' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/f.db"]
    assert subprocess.check_output(command, text=True) == "True False False\n"
    assert subprocess.check_output(command, text=True) == "False False False\n"


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/f.db"
    database = await Database.open(url)
    await Models(database).save("m", {"a": 1})
    await database.write(
        lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")).close()
    )
    await database.close()
    with pytest.raises(StoreError) as refused:
        await Database.open(url)
    assert "9999" in refused.value.message
    assert "newer Fleetmind" in refused.value.hint
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT document FROM models")).scalar_one() == '{"a":1}'
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/f.db")

    def tables(connection: Connection) -> list[str]:
        return list(connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars())

    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        # The last table is in the way, so that all before it have been made when it fails.
        connection.exec_driver_sql("SAVEPOINT before")
        connection.exec_driver_sql("CREATE TABLE usage (x)")
        with pytest.raises(Exception, match="usage"):
            upgrade.upgrade(connection)
        assert "journal" in tables(connection)
        connection.rollback()
        assert tables(connection) == []
    engine.dispose()


@pytest.mark.skipif(sys.platform == "win32", reason="paths are others there")
def test_migrations_run_from_a_wheel_in_an_awkward_place(tmp_path: Path) -> None:
    """From files alone, as installed: without the working tree, in a directory with a percent sign and a space."""
    site = tmp_path / "site 100%s"
    root = MIGRATIONS.parents[1]
    archive = tmp_path / "fleetmind.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in (root / "core", root / "store"):
            for file in path.rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts:
                    packed.write(file, Path("fleetmind") / file.relative_to(root))
        packed.write(root / "__init__.py", "fleetmind/__init__.py")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(site)
    code = (
        "import asyncio, sys, fleetmind\n"
        "assert fleetmind.__file__.startswith(sys.argv[2]), fleetmind.__file__\n"
        "from fleetmind.store.database import Database\n"
        "async def main():\n"
        "    await (await Database.open(sys.argv[1])).close()\n"
        "asyncio.run(main())\n"
    )
    # Read-only, as a system's site-packages is for its users.
    for path in sorted(site.rglob("*"), reverse=True):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path}/f.db", str(site)],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    for path in site.rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
