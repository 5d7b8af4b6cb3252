"""The chain: any change of any entry changes its hash; canonical text is one for equal values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from fleetmind.core.errors import InvalidRequest, JournalBroken
from fleetmind.core.events import Event, EventKind
from fleetmind.store.database import Database
from fleetmind.store.journal import DATA_CHARS_MAX, FIRST_HASH, Journal, canonical, chain_hash

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
rows = st.tuples(
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.integers(1, 2**63 - 1),
    st.floats(0, 4e9),
    st.text(max_size=8),
    st.text(max_size=8),
    st.text(max_size=8),
)


@given(rows, rows)
def test_two_entries_have_one_hash_only_if_they_are_one(first: tuple, second: tuple) -> None:  # type: ignore[type-arg]
    assert (chain_hash(*first) == chain_hash(*second)) == (first == second)


@given(rows, st.integers(0, 5), st.text(min_size=1, max_size=3))
def test_a_change_of_any_part_changes_the_hash(row: tuple, part: int, more: str) -> None:  # type: ignore[type-arg]
    changed = list(row)
    changed[part] = row[part] + (1 if part in (1, 2) else more)
    if changed[part] != row[part]:
        assert chain_hash(*row) != chain_hash(*changed)


def test_text_cannot_move_between_the_parts_of_an_entry() -> None:
    assert chain_hash(FIRST_HASH, 1, 1.0, "a", "b", "c") != chain_hash(FIRST_HASH, 1, 1.0, "ab", "", "c")
    assert chain_hash(FIRST_HASH, 1, 1.0, 'a","b', "", "c") != chain_hash(FIRST_HASH, 1, 1.0, "a", "b", "c")


@given(st.dictionaries(st.text(), values))
def test_canonical_text_is_ascii_keeps_the_value_and_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    written = canonical(value)
    assert written.isascii()
    assert json.loads(written) == value
    assert canonical(dict(reversed(value.items()))) == written


def test_the_hash_is_as_documented() -> None:
    # Computed by hand with sha256sum; it must never change, or no journal verifies any more.
    assert chain_hash(FIRST_HASH, 1, 1.5, "server.started", "s", "{}") == (
        "95d43a906707b176739e0a498117a95e3d08570ec98302c94343567968a5bf38"
    )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE journal SET at_s = x'00' WHERE position = 2",
        "UPDATE journal SET data = x'ff' WHERE position = 2",
        "UPDATE journal SET hash = 'é' WHERE position = 2",
        "UPDATE journal SET position = 'two' WHERE position = 2",
        "UPDATE journal SET kind = 5 WHERE position = 2",
    ],
)
async def test_values_of_a_wrong_type_are_found_not_tripped_over(statement: str) -> None:
    database = await Database.open("sqlite://")
    journal = Journal(database)
    await journal.append(*(Event(EventKind.SERVER_STARTED, "s", 1.0) for _ in range(3)))
    await database.write(lambda connection: connection.execute(text("DROP TRIGGER journal_no_update")).close())
    await database.write(lambda connection: connection.execute(text(statement)).close())
    fault = (await journal.verify()).fault
    assert fault is not None
    assert fault.position == 2
    await database.close()


async def test_an_entry_that_is_no_json_is_refused_by_its_number() -> None:
    database = await Database.open("sqlite://")
    await Journal(database).append(Event(EventKind.SERVER_STARTED, "s", 1.0))
    await database.write(lambda connection: connection.execute(text("DROP TRIGGER journal_no_update")).close())
    await database.write(lambda connection: connection.execute(text("UPDATE journal SET data = '{'")).close())
    with pytest.raises(JournalBroken, match="entry 1"):
        await Journal(database).entries()
    await database.close()


@pytest.mark.parametrize("subject", ["a\0b", "a\nb", "\ud800"])
async def test_a_subject_that_no_database_can_keep_is_refused(subject: str) -> None:
    database = await Database.open("sqlite://")
    with pytest.raises(InvalidRequest):
        await Journal(database).append(Event(EventKind.SERVER_STARTED, subject, 1.0))
    await database.close()


async def test_a_huge_event_is_refused() -> None:
    database = await Database.open("sqlite://")
    with pytest.raises(InvalidRequest):
        await Journal(database).append(Event(EventKind.SERVER_STARTED, "s", 1.0, {"x": "y" * DATA_CHARS_MAX}))
    assert await Journal(database).last() == 0
    await database.close()
