"""API keys: shown once when they are made, kept as keyed hashes, found in constant time.

A key reads `minga_ID_SECRET`. The id is public and names the key's record; the secret is 32
random bytes, which nobody guesses, so one fast keyed hash protects it at rest: BLAKE2b (RFC 7693)
with a random key of the file's own, so that hashes of two files cannot be compared. Slow hashes
are for passwords, which people choose, and would make each request slow.

This module reads keys; `minga.serving.key_store` changes them.
"""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from minga.inference.errors import AccessError

PREFIX: Final = "minga"
"""What every key begins with, for tools that look for secrets where none should be."""

MAX_NAME_LENGTH: Final = 100

_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 16 * 1024 * 1024


class Permission(StrEnum):
    """What a request needs leave for."""

    ASK = "ask"
    WATCH = "watch"
    METRICS = "metrics"
    MANAGE = "manage"


class Role(StrEnum):
    """What a key is for."""

    CALLER = "caller"
    """Asks models, and about them."""

    MONITOR = "monitor"
    """Reads metrics and statistics."""

    OPERATOR = "operator"
    """Both, and loads and unloads models where the server lets its callers do that."""

    @property
    def permissions(self) -> frozenset[Permission]:
        """What the role may do."""
        return _PERMISSIONS[self]


_PERMISSIONS: Final = {
    Role.CALLER: frozenset({Permission.ASK}),
    Role.MONITOR: frozenset({Permission.WATCH, Permission.METRICS}),
    Role.OPERATOR: frozenset(Permission),
}


class KeyRecord(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    role: Role
    hash: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    requests_per_s: float | None = Field(None, gt=0)
    """How many requests the key may make a second, on average; None means any number."""
    burst: int = Field(1, ge=1)
    """How many of them at once, after a pause."""

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """Tell whether the key counts."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "valid"


class KeyRing(BaseModel):
    """All keys of a server, in the form of their file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    salt: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    """The hash's key; worth nothing by itself."""
    keys: tuple[KeyRecord, ...] = ()

    @classmethod
    def empty(cls) -> "KeyRing":
        """Make a ring without keys."""
        return cls(salt=secrets.token_hex(32))

    @classmethod
    def read(cls, file: Path) -> "KeyRing":
        """Read a file of keys.

        Raises:
            AccessError: it cannot be read, or is no such file.
        """
        try:
            with file.open("rb") as opened:
                return cls.model_validate_json(opened.read(_MAX_FILE_BYTES))
        except OSError as error:
            raise AccessError(
                f"cannot read the keys in {file}: {error.strerror}; "
                "`minga key create NAME` makes the first"
            ) from error
        except ValidationError as error:
            # Its own words would show what is in the file.
            raise AccessError(
                f"{file} is no file of keys ({error.error_count()} errors in it); "
                "`minga key create NAME` makes one elsewhere"
            ) from None

    def hash_of(self, secret: str) -> str:
        """Hash a key's secret part."""
        salt = bytes.fromhex(self.salt)
        return hashlib.blake2b(secret.encode(), key=salt, digest_size=32).hexdigest()


class NewKey(NamedTuple):
    """The words of a new key, which are kept nowhere, and its parts."""

    text: str
    id: str
    secret: str


def new_key() -> NewKey:
    """Draw a key."""
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    return NewKey(f"{PREFIX}_{key_id}_{secret}", key_id, secret)


class KeyIndex:
    """A ring made ready for looking keys up.

    Args:
        ring: the keys.
    """

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring
        self._records = {record.id: record for record in ring.keys}

    def find(self, text: str, now: datetime | None = None) -> KeyRecord | None:
        """Give the record of a key that counts now; None for every other text."""
        prefix, _, rest = text.partition("_")
        key_id, _, secret = rest.partition("_")
        record = self._records.get(key_id)
        if prefix != PREFIX or record is None:
            return None
        if not hmac.compare_digest(self._ring.hash_of(secret), record.hash):
            return None
        return record if record.state(now or datetime.now(UTC)) == "valid" else None
