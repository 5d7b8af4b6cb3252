"""Addresses and what goes wrong with them: each a clear error, none with a password in it."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.errors import StoreError
from fleetmind.store.connections import make_engines
from fleetmind.store.database import Database
from fleetmind.store.integrity import fault_of
from fleetmind.store.models import Models


async def refusal(url: str) -> StoreError:
    with pytest.raises(StoreError) as refused:
        await Database.open(url)
    return refused.value


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("hunter2", "Write sqlite:///PATH"),
        ("mysql://me:hunter2@host/db", "Use sqlite:///PATH"),
        ("postgresql+psycopg2://me:hunter2@host/db", "without a driver"),
        ("postgresql://me:hunter2@host/db?sslmode=perhaps", "Use disable, require or verify-full"),
        ("postgresql://me:hunter2@127.0.0.1:1/db", "Check that PostgreSQL is running"),
        ("postgresql://me:hunter2@host.invalid/db", "the host and port"),
    ],
)
async def test_an_address_that_does_not_lead_anywhere_says_what_to_do(url: str, hint: str) -> None:
    error = await refusal(url)
    assert hint in error.hint
    assert "hunter2" not in error.message + error.hint


def test_the_password_is_hidden_where_an_address_is_shown() -> None:
    assert make_engines("postgresql://me:hunter2@host/db").shown == "postgresql://me:***@host/db"


@pytest.mark.parametrize(("mode", "is_encrypted"), [("disable", False), ("require", True), ("verify-full", True)])
def test_sslmode_decides_on_encryption(mode: str, is_encrypted: bool) -> None:
    engines = make_engines(f"postgresql://me:x@host/db?sslmode={mode}")
    assert "sslmode" not in engines.writer.url.query
    _, arguments = engines.writer.dialect.create_connect_args(engines.writer.url)
    assert "sslmode" not in arguments


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    path.write_bytes(b"my thesis, " * 1000)
    error = await refusal(f"sqlite:///{path}")
    assert "not a database" in error.hint
    assert path.read_bytes() == b"my thesis, " * 1000


async def test_a_directory_that_cannot_hold_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "directory exists" in (await refusal(f"sqlite:///{tmp_path}/file/f.db")).hint
    assert "directory exists" in (await refusal(f"sqlite:///{tmp_path}")).hint


@pytest.mark.parametrize("name", ["a b", "100%20", "what?mode=ro", "ü#1", "f.db"])
async def test_the_path_is_taken_as_it_stands(tmp_path: Path, name: str) -> None:
    await (await Database.open(f"sqlite:///{tmp_path}/{name}")).close()
    assert [file.name for file in tmp_path.iterdir()] == [name]


async def test_two_slashes_are_not_taken_for_memory() -> None:
    assert "three slashes" in (await refusal("sqlite://home/me/f.db")).hint


async def test_a_file_that_others_may_read_becomes_private(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    path.touch(mode=0o644)
    await (await Database.open(f"sqlite:///{path}")).close()
    assert path.stat().st_mode & 0o777 == 0o600


# Another process that holds the write lock: waited for as long as promised, then a clear refusal.
HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


async def test_a_file_that_another_process_writes_to_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    database = await Database.open(f"sqlite:///{path}")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError) as refused:
            await Models(database).save("m", {})
        assert "Another process" in refused.value.hint
        assert await Models(database).all() == {}, "a reader waits for no writer"
    finally:
        holder.communicate("")
    await Models(database).save("m", {})
    await database.close()


async def test_damage_in_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    database = await Database.open(f"sqlite:///{path}")
    for number in range(200):
        await Models(database).save(f"m{number}", {"x": "y" * 500})
    assert await fault_of(database, is_thorough=True) is None
    await database.close()
    content = bytearray(path.read_bytes())
    half = len(content) // 2 // 4096 * 4096
    content[half : half + 8192] = bytes(8192)
    path.write_bytes(content)
    database = await Database.open(f"sqlite:///{path}")
    damage = await fault_of(database, is_thorough=True)
    await database.close()
    assert damage is not None


@given(st.text(max_size=60))
def test_text_that_is_no_address_is_a_store_error(text: str) -> None:
    # Those that lead to a file are not tried: they would be made.
    if not text.startswith("sqlite"):
        with pytest.raises(StoreError) as refused:
            make_engines(text)
        assert refused.value.hint


def test_this_python_s_sqlite_can_do_what_we_rely_on() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35), "UPDATE … RETURNING came with 3.35"
