import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.api.auth import KeyRing, Principal, Scope, bearer_of, check_scope, make_key
from fleetmind.core.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated
from fleetmind.core.types import KeyId
from fleetmind.store.database import Database
from fleetmind.store.journal import Journal
from fleetmind.store.keys import Keys
from fleetmind.testing.clocks import ManualClock


@pytest.fixture
async def database():
    opened = await Database.open("sqlite://")
    yield opened
    await opened.close()


async def ring_on(database: Database, clock: ManualClock | None = None, pepper: bytes = b"p" * 32) -> KeyRing:
    ring = KeyRing(Keys(database), pepper, clock or ManualClock())
    await ring.load()
    return ring


def test_keys_are_unlike_each_other_and_carry_their_checksum() -> None:
    keys = {make_key() for _ in range(200)}
    assert len({key_id for key_id, _ in keys}) == 200
    for key_id, text in keys:
        body, _, checksum = text.rpartition("_")
        assert text.startswith(f"fm_{key_id}_")
        assert len(text) == len("fm_") + 8 + 1 + 43 + 1 + 6
        number = sum(
            "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz".index(c) * 62 ** (5 - i)
            for i, c in enumerate(checksum)
        )
        assert number == zlib.crc32(body.encode())


async def test_a_key_opens_until_it_is_revoked(database: Database) -> None:
    ring = await ring_on(database)
    record, text = await ring.create("me", {Scope.INFER}, created_by="t")
    assert ring.verify(text.encode()).key_id == record.id
    await ring.revoke(record.id, revoked_by="t")
    with pytest.raises(Unauthenticated):
        ring.verify(text.encode())
    with pytest.raises(NotFound):
        await ring.revoke(record.id, revoked_by="t")
    kinds = [entry.kind for entry in await Journal(database).entries()]
    assert kinds == ["key.created", "key.revoked"]


async def test_keys_outlive_the_server_and_revoked_ones_do_not(database: Database) -> None:
    ring = await ring_on(database)
    kept, kept_text = await ring.create("kept", {Scope.INFER}, created_by="t")
    gone, gone_text = await ring.create("gone", {Scope.INFER}, created_by="t")
    await ring.revoke(gone.id, revoked_by="t")
    again = await ring_on(database)
    assert again.verify(kept_text.encode()).key_id == kept.id
    with pytest.raises(Unauthenticated):
        again.verify(gone_text.encode())


async def test_the_database_alone_opens_nothing(database: Database) -> None:
    ring = await ring_on(database)
    record, text = await ring.create("me", {Scope.INFER}, created_by="t")
    assert text.encode() not in record.digest
    with pytest.raises(Unauthenticated):
        (await ring_on(database, pepper=b"q" * 32)).verify(text.encode())


async def test_a_key_expires(database: Database) -> None:
    clock = ManualClock()
    ring = await ring_on(database, clock)
    _, text = await ring.create("short", {Scope.INFER}, expires_in_s=10, created_by="t")
    ring.verify(text.encode())
    await clock.advance(10)
    with pytest.raises(Unauthenticated):
        ring.verify(text.encode())


async def test_last_use_is_stored_later(database: Database) -> None:
    clock = ManualClock()
    ring = await ring_on(database, clock)
    record, text = await ring.create("me", {Scope.INFER}, created_by="t")
    ring.verify(text.encode())
    assert (await ring.records())[0].last_used_at_s is None
    await ring.write_last_used()
    (found,) = await ring.records()
    assert (found.id, found.last_used_at_s) == (record.id, clock.now_s())


@pytest.mark.parametrize(
    ("name", "scopes", "expires"),
    [
        ("", {"infer"}, None),
        ("a\nb", {"infer"}, None),
        ("x" * 101, {"infer"}, None),
        ("a", set(), None),
        ("a", {"root"}, None),
        ("a", {"infer"}, 0),
    ],
)
async def test_keys_that_make_no_sense_are_refused(
    database: Database, name: str, scopes: set[str], expires: float | None
) -> None:
    with pytest.raises(InvalidRequest):
        await (await ring_on(database)).create(name, scopes, expires_in_s=expires, created_by="t")


@given(st.binary(max_size=100))
def test_bytes_that_are_no_key_are_refused(key: bytes) -> None:
    ring = KeyRing(None, b"p" * 32, ManualClock())  # type: ignore[arg-type]  # an empty ring asks no database
    with pytest.raises(Unauthenticated):
        ring.verify(key)


def test_one_way_to_present_a_key() -> None:
    assert bearer_of([(b"authorization", b"Bearer fm_x")], b"") == b"fm_x"
    assert bearer_of([(b"authorization", b"bearer  fm_x ")], b"a=b") == b"fm_x"
    assert bearer_of([], b"model=x") is None
    for headers, query in (
        ([(b"authorization", b"Basic eDp5")], b""),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")], b""),
        ([(b"authorization", b"Bearer a"), (b"x-api-key", b"b")], b""),
        ([(b"api-key", b"fm_x")], b""),
        ([], b"key=fm_x"),
        ([], b"API_KEY=x"),
        ([], b"x=fm_abc"),
    ):
        with pytest.raises(InvalidRequest):
            bearer_of(headers, query)


def test_a_right_is_needed_and_enough() -> None:
    reader = Principal(KeyId("k"), frozenset({Scope.READ}))
    assert check_scope(reader, Scope.READ) is reader
    with pytest.raises(Forbidden, match="admin"):
        check_scope(reader, Scope.ADMIN)
    with pytest.raises(Unauthenticated, match="No key"):
        check_scope(None, Scope.READ)
    wrong = Unauthenticated("not valid")
    with pytest.raises(Unauthenticated) as refused:
        check_scope(wrong, Scope.READ)
    assert refused.value is wrong
