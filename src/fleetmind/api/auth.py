"""Who asks, and what they may do.

Keys look like ``fm_<id>_<secret>_<checksum>``; only their MAC is stored, so a stolen database opens nothing. A key is
checked against memory: creating and revoking change it at once. There is one way to present a key, the header
``Authorization: Bearer``; two at once, or one in the URL, is refused.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from fleetmind.core.clock import Clock, secret_token
from fleetmind.core.errors import CallerError, Forbidden, InvalidRequest, NotFound, Unauthenticated
from fleetmind.core.events import Event, EventKind
from fleetmind.core.types import KeyId
from fleetmind.store.keys import KeyRecord, Keys

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH, _SECRET_LENGTH, _CHECKSUM_LENGTH = 8, 43, 6
KEY_NAME_MAX = 100


class Scope(StrEnum):
    """What a key may be used for."""

    INFER = "infer"
    READ = "read"
    METRICS = "metrics"
    ADMIN = "admin"


FIRST_KEY_SCOPES = frozenset({Scope.INFER, Scope.READ, Scope.METRICS})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a valid key's id and rights. An empty ``models`` means all models."""

    key_id: KeyId
    scopes: frozenset[str]
    models: frozenset[str] = frozenset()
    expires_at_s: float | None = None


class KeyRing:
    """All keys, in memory by their digest; the database has the same."""

    def __init__(self, keys: Keys, pepper: bytes, clock: Clock) -> None:
        self._keys = keys
        self._pepper = pepper
        self._clock = clock
        self._by_digest: dict[bytes, Principal] = {}
        self._used_at_s: dict[KeyId, float] = {}

    async def load(self) -> None:
        """Read all keys from the database."""
        self._by_digest = {
            record.digest: _principal(record) for record in await self._keys.all() if record.revoked_at_s is None
        }

    def verify(self, key: bytes) -> Principal:
        """Whose key it is. Raises Unauthenticated, without saying whether it is unknown, revoked or expired."""
        principal = self._by_digest.get(self._digest(key))
        if principal is None:
            raise _refused()
        now_s = self._clock.now_s()
        if principal.expires_at_s is not None and principal.expires_at_s <= now_s:
            raise _refused()
        self._used_at_s[principal.key_id] = now_s
        return principal

    async def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        models: Iterable[str] = (),
        expires_in_s: float | None = None,
        created_by: str,
    ) -> tuple[KeyRecord, str]:
        """A new key; its text is returned once and stored nowhere. Raises InvalidRequest."""
        scopes = frozenset(scopes)
        unknown = scopes - set(Scope)
        if unknown or not scopes:
            known = ", ".join(Scope)
            raise InvalidRequest(
                f"scopes {sorted(unknown) or 'is empty'} can't be used.", hint=f"Choose among {known}.", param="scopes"
            )
        if not name.strip() or len(name) > KEY_NAME_MAX or not name.isprintable():
            raise InvalidRequest(f"name must have 1 to {KEY_NAME_MAX} printable characters.", param="name")
        if expires_in_s is not None and not expires_in_s > 0:
            raise InvalidRequest(f"expires_in_s is {expires_in_s}.", hint="Give seconds above 0.", param="expires_in_s")
        key_id, text = make_key()
        now_s = self._clock.now_s()
        record = KeyRecord(
            id=key_id,
            name=name.strip(),
            digest=self._digest(text.encode()),
            scopes=scopes,
            models=frozenset(models),
            created_at_s=now_s,
            expires_at_s=None if expires_in_s is None else now_s + expires_in_s,
            revoked_at_s=None,
            last_used_at_s=None,
        )
        data = {"name": record.name, "scopes": sorted(scopes), "by": created_by}
        await self._keys.insert(record, Event(EventKind.KEY_CREATED, key_id, now_s, data))
        self._by_digest[record.digest] = _principal(record)
        return record, text

    async def revoke(self, key_id: str, *, revoked_by: str) -> None:
        """End a key at once. Raises NotFound for an unknown or already revoked one."""
        now_s = self._clock.now_s()
        event = Event(EventKind.KEY_REVOKED, key_id, now_s, {"by": revoked_by})
        if not await self._keys.revoke(KeyId(key_id), now_s, event):
            near = [principal.key_id for principal in self._by_digest.values() if principal.key_id[:2] == key_id[:2]]
            raise NotFound(f"There is no key {key_id!r} to revoke.", hint="`fleetmind keys ls` shows them.", near=near)
        self._by_digest = {
            digest: principal for digest, principal in self._by_digest.items() if principal.key_id != key_id
        }

    def _digest(self, key: bytes) -> bytes:
        """What of a key is stored. Keyed BLAKE2b is a MAC (RFC 7693), and ten times faster here than HMAC-SHA256."""
        return hashlib.blake2b(key, key=self._pepper, digest_size=32).digest()

    async def records(self) -> tuple[KeyRecord, ...]:
        """All keys, revoked ones too, without their text."""
        return tuple(await self._keys.all())

    async def write_last_used(self) -> None:
        """Store when keys were last used; called now and then, never by a request."""
        used, self._used_at_s = self._used_at_s, {}
        used.pop(OPERATOR_KEY_ID, None)
        if used:
            await self._keys.touch(used)

    def add_operator(self) -> str:
        """A key with all rights that lives in memory until the server ends, for the owner's command line."""
        _, text = make_key()
        digest = self._digest(text.encode())
        self._by_digest[digest] = Principal(OPERATOR_KEY_ID, frozenset(Scope))
        return text


OPERATOR_KEY_ID = KeyId("operator")


def make_key() -> tuple[KeyId, str]:
    """A new key's id and text."""
    key_id = _base62(int.from_bytes(secret_token(8)), _ID_LENGTH)
    body = f"fm_{key_id}_{_base62(int.from_bytes(secret_token(32)), _SECRET_LENGTH)}"
    return KeyId(key_id), f"{body}_{_base62(zlib.crc32(body.encode()), _CHECKSUM_LENGTH)}"


def pepper_from(seed: bytes) -> bytes:
    """The key of the MAC, from the secret file of this installation."""
    return hashlib.sha256(b"fleetmind keys\0" + seed).digest()


def bearer_of(headers: Iterable[tuple[bytes, bytes]], query: bytes) -> bytes | None:
    """The key that a request presents, None for none.

    Raises InvalidRequest for a key in the URL, several keys, or another scheme than Bearer.
    """
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() != b"bearer" or found is not None:
                raise InvalidRequest("Send exactly one header `Authorization: Bearer fm_…`.")
            found = key.strip()
        elif name in _OTHER_KEY_HEADERS:
            raise InvalidRequest(
                f"Keys are not read from {name.decode('latin-1')}.", hint="Send `Authorization: Bearer fm_…`."
            )
    if query and (_KEY_TEXT.search(query) or _KEY_FIELD.search(query)):
        raise InvalidRequest(
            "A key must not stand in the URL, where logs and histories keep it.",
            hint="Send it as `Authorization: Bearer fm_…`, and revoke this one if it was real.",
        )
    return found


_OTHER_KEY_HEADERS = frozenset({b"x-api-key", b"api-key"})
_KEY_TEXT = re.compile(rb"\bfm_[0-9A-Za-z]")
_KEY_FIELD = re.compile(rb"(?:^|[&;])(?:api[_-]?key|access_token|token|key)=", re.IGNORECASE)


def check_scope(principal: Principal | CallerError | None, scope: Scope) -> Principal:
    """``principal``, if it has ``scope``; raises Unauthenticated, Forbidden, or what was wrong with its key."""
    if isinstance(principal, CallerError):
        raise principal
    if principal is None:
        raise Unauthenticated(
            "No key was sent.", hint="Send `Authorization: Bearer fm_…`; `fleetmind keys create` makes one."
        )
    if scope not in principal.scopes:
        raise Forbidden(
            f"This key lacks the scope {scope.value}; it has {', '.join(sorted(principal.scopes))}.",
            hint=f"Make one that has it: fleetmind keys create NAME --scope {scope}",
        )
    return principal


def _principal(record: KeyRecord) -> Principal:
    return Principal(record.id, record.scopes, record.models, record.expires_at_s)


def _refused() -> Unauthenticated:
    return Unauthenticated("This key is not valid.", hint="`fleetmind keys create` makes a new one.")


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
