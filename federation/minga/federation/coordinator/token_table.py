"""Where token hashes are kept: in SQLite, or in memory."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from minga.federation.coordinator.tokens import Refusal

SCHEMA: Final = (
    """
    CREATE TABLE IF NOT EXISTS enrolment_tokens (
        digest BLOB PRIMARY KEY,
        group_name TEXT NOT NULL,
        expires_at REAL NOT NULL,
        uses INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS enrolment_redemptions (
        digest BLOB NOT NULL REFERENCES enrolment_tokens,
        redeemer BLOB NOT NULL,
        redeemed_at REAL NOT NULL,
        PRIMARY KEY (digest, redeemer)
    ) WITHOUT ROWID
    """,
)

# One statement, hence atomic between connections and processes without a lock of our own: the row
# appears only if the token holds and has a use left at that moment.
_TAKE_USE: Final = """
    INSERT OR IGNORE INTO enrolment_redemptions (digest, redeemer, redeemed_at)
    SELECT digest, :redeemer, :now FROM enrolment_tokens
    WHERE digest = :digest AND expires_at > :now AND uses > (
        SELECT count(*) FROM enrolment_redemptions WHERE digest = :digest
    )
"""
_FIND: Final = """
    SELECT group_name, expires_at, EXISTS (
        SELECT 1 FROM enrolment_redemptions WHERE digest = :digest AND redeemer = :redeemer
    )
    FROM enrolment_tokens WHERE digest = :digest
"""


class TokenTable:
    """Token hashes in SQLite; several processes may have the database open.

    The connection stays the caller's: it is used from the thread that it belongs to and is never
    closed here. Inside a transaction of the caller's, what happens here is part of that.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        with _change(connection):
            for statement in SCHEMA:
                connection.execute(statement)

    def put(self, digest: bytes, group: str, expires_at: float, uses: int) -> None:
        """Keep a new token's hash."""
        with _change(self._connection):
            self._connection.execute(
                "INSERT INTO enrolment_tokens VALUES (?, ?, ?, ?)",
                (digest, group, expires_at, uses),
            )

    def redeem(self, digest: bytes, redeemer: bytes, now: float) -> str | Refusal:
        """Take one use for a redeemer, unless it has one."""
        values = {"digest": digest, "redeemer": redeemer, "now": now}
        with _change(self._connection):
            self._connection.execute(_TAKE_USE, values)
        row = self._connection.execute(_FIND, values).fetchone()
        if row is None:
            return Refusal.UNKNOWN
        group, expires_at, has_use = row
        if expires_at <= now:
            return Refusal.EXPIRED
        return str(group) if has_use else Refusal.USED


@contextmanager
def _change(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit at the end, unless the caller is in a transaction."""
    if connection.in_transaction:
        yield
        return
    with connection:
        yield


@dataclass(slots=True, kw_only=True)
class _Entry:
    group: str
    expires_at: float
    uses: int
    redeemers: set[bytes] = field(default_factory=set)


class MemoryTokens:
    """Token hashes that are gone with the process, for simulations and tests."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._lock = threading.Lock()

    def put(self, digest: bytes, group: str, expires_at: float, uses: int) -> None:
        """Keep a new token's hash."""
        with self._lock:
            self._entries[digest] = _Entry(group=group, expires_at=expires_at, uses=uses)

    def redeem(self, digest: bytes, redeemer: bytes, now: float) -> str | Refusal:
        """Take one use for a redeemer, unless it has one."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return Refusal.UNKNOWN
            if entry.expires_at <= now:
                return Refusal.EXPIRED
            if redeemer not in entry.redeemers and len(entry.redeemers) >= entry.uses:
                return Refusal.USED
            entry.redeemers.add(redeemer)
            return entry.group
