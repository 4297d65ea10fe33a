"""The audit log in the coordinator's database: what is written, when it is signed, how it is read.

An entry is part of the transaction that the event itself is in, where there is one: neither is ever
without the other. Checkpoints are signed every `AUDIT_CHECKPOINT_ENTRIES`, by time, when the
coordinator starts and when it stops.

What outsiders can cause at will (refused calls, refused messages) is written a few times a minute
for each of them and counted beyond that, so that nobody can fill the disk by being refused.

Triggers refuse changes of what is written: they stop mistakes. Attackers the chain shows.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Final

from minga.federation.audit import (
    IDENTITY_REVOKED,
    NOTHING,
    Checkpoint,
    Detail,
    Entry,
    Record,
    broken,
    canonical,
    from_line,
)
from minga.federation.coordinator.rate import Rate
from minga.federation.coordinator.store import Store
from minga.federation.errors import FederationError
from minga.federation.identity import Clock, Identity, utc_now
from minga.federation.limits import (
    AUDIT_CHECKPOINT_ENTRIES,
    AUDIT_CHECKPOINT_S,
    AUDITED_REFUSALS_PER_MINUTE,
)

SCHEMA: Final = (
    """
    CREATE TABLE IF NOT EXISTS audit_log (
        sequence INTEGER PRIMARY KEY,
        time TEXT NOT NULL,
        kind TEXT NOT NULL,
        subject TEXT NOT NULL,
        details TEXT NOT NULL,
        previous BLOB NOT NULL,
        hash BLOB NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE IF NOT EXISTS audit_checkpoints (
        sequence INTEGER PRIMARY KEY REFERENCES audit_log,
        hash BLOB NOT NULL,
        time TEXT NOT NULL,
        previous_checkpoint INTEGER NOT NULL,
        certificate BLOB NOT NULL,
        signature BLOB NOT NULL
    ) STRICT
    """,
    *(
        f"""
        CREATE TRIGGER IF NOT EXISTS {table}_keeps_{change.lower()}
        BEFORE {change} ON {table}
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """
        for table in ("audit_log", "audit_checkpoints")
        for change in ("UPDATE", "DELETE")
    ),
)

_ENTRIES: Final = (
    "SELECT sequence, time, kind, subject, details, previous, hash FROM audit_log ORDER BY sequence"
)
_CHECKPOINTS: Final = (
    "SELECT sequence, hash, time, previous_checkpoint, certificate, signature"
    " FROM audit_checkpoints ORDER BY sequence"
)
_SQLITE_HEADER: Final = b"SQLite format 3\x00"


class Kind(StrEnum):
    """What an entry tells of."""

    COORDINATOR_STARTED = "coordinator-started"
    COORDINATOR_STOPPED = "coordinator-stopped"
    SERVER_CERTIFICATE_ISSUED = "server-certificate-issued"
    OPERATOR_CERTIFICATE_ISSUED = "operator-certificate-issued"
    TOKEN_MADE = "token-made"  # noqa: S105 - the name of an event
    TOKEN_REDEEMED = "token-redeemed"  # noqa: S105
    ENROLMENT_REFUSED = "enrolment-refused"
    DEVICE_ENROLLED = "device-enrolled"
    DEVICE_RENEWED = "device-renewed"
    RENEWAL_REFUSED = "renewal-refused"
    DEVICE_REVOKED = "device-revoked"
    IDENTITY_REVOKED = IDENTITY_REVOKED
    ACCESS_REFUSED = "access-refused"
    MESSAGE_REFUSED = "message-refused"
    DEVICE_WITHDREW = "device-withdrew"
    FALSE_SHARES = "false-shares"
    CAMPAIGN_STARTED = "campaign-started"
    CAMPAIGN_ENDED = "campaign-ended"
    CAMPAIGN_CANCELLED = "campaign-cancelled"
    ROUND_COMMITTED = "round-committed"
    ROUND_ABORTED = "round-aborted"
    MODEL_PUBLISHED = "model-published"
    MODEL_REPORTED = "model-reported"


class AuditLog:
    """Writes the audit log of one coordinator.

    Args:
        store: The database; used from its thread.
        signer: Gives the identity that signs checkpoints, valid at that moment.
        clock: The time of entries.
    """

    def __init__(
        self, store: Store, *, signer: Callable[[], Identity], clock: Clock = utc_now
    ) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock
        self._signed_at = clock()
        self._outsiders = Rate[tuple[Kind, str]](
            per_minute=AUDITED_REFUSALS_PER_MINUTE, clock=clock
        )
        with store.transaction():
            for statement in SCHEMA:
                store.connection.execute(statement)

    def append(self, kind: Kind, subject: str, /, **details: Detail) -> None:
        """Write an entry, in the transaction that is open or in one of its own."""
        with self._store.transaction():
            sequence, previous = self._head()
            entry = Entry.following(
                sequence,
                previous,
                time=self._clock(),
                kind=kind.value,
                subject=subject,
                details=details,
            )
            self._store.connection.execute(
                "INSERT INTO audit_log VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    entry.sequence,
                    entry.time,
                    entry.kind,
                    entry.subject,
                    canonical(details),
                    entry.previous,
                    entry.hash,
                ),
            )
            if entry.sequence - self._signed_until() >= AUDIT_CHECKPOINT_ENTRIES:
                self.sign()

    def append_limited(self, kind: Kind, subject: str, /, **details: Detail) -> bool:
        """Write what an outsider can cause at will, or count it if the minute is full.

        Returns:
            True if it was written.
        """
        is_allowed = self._outsiders.allows((kind, subject))
        if is_allowed:
            self.append(kind, subject, **details)
        return is_allowed

    def sign(self) -> None:
        """Sign a checkpoint of the last entry, unless there is one."""
        with self._store.transaction():
            sequence, last_hash = self._head()
            previous = self._signed_until()
            if sequence == previous:
                return
            # First the signer: a certificate that is made now must not begin after the signature.
            signer, now = self._signer(), self._clock()
            checkpoint = Checkpoint.signed(
                signer, sequence=sequence, digest=last_hash, time=now, previous=previous
            )
            self._store.connection.execute(
                "INSERT INTO audit_checkpoints VALUES (?, ?, ?, ?, ?, ?)",
                (
                    checkpoint.sequence,
                    checkpoint.hash,
                    checkpoint.time,
                    checkpoint.previous_checkpoint,
                    checkpoint.certificate,
                    checkpoint.signature,
                ),
            )
            self._signed_at = now

    def tend(self) -> None:
        """Do what time brings: tell what was counted, sign a log that grows slowly."""
        self._tell_counted()
        if not 0 <= (self._clock() - self._signed_at).total_seconds() < AUDIT_CHECKPOINT_S:
            self.sign()

    def close(self) -> None:
        """Tell what was counted and sign all; the store stays open."""
        self._tell_counted(everything=True)
        self.sign()

    def _tell_counted(self, *, everything: bool = False) -> None:
        for (kind, subject), num_refused in self._outsiders.sweep(everything=everything):
            self.append(kind, subject, more=num_refused)

    def _head(self) -> tuple[int, bytes]:
        # Read each time: a transaction that is rolled back takes its entries with it.
        row = self._store.connection.execute(
            "SELECT sequence, hash FROM audit_log ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        return (0, NOTHING) if row is None else (row[0], row[1])

    def _signed_until(self) -> int:
        row = self._store.connection.execute(
            "SELECT coalesce(max(sequence), 0) FROM audit_checkpoints"
        ).fetchone()
        return int(row[0])


def read_log(path: Path) -> Iterator[Record]:
    """Read a log from a coordinator's database, which may be in use, or from an export.

    Raises:
        FederationError: there is no such file, or it cannot be read.
        AuditError: what is read is no record of a log.
    """
    try:
        with path.open("rb") as file:
            is_database = file.read(len(_SQLITE_HEADER)) == _SQLITE_HEADER
        yield from _read_database(path) if is_database else _read_export(path)
    except (OSError, sqlite3.Error) as error:
        raise FederationError(
            f"cannot read an audit log from {path} ({error}); name a coordinator's state folder "
            "with --state, its coordinator.db, or an export"
        ) from error


def _read_export(path: Path) -> Iterator[Record]:
    with path.open(encoding="ascii", errors="replace", newline="\n") as file:
        for line in file:
            if not line.endswith("\n"):
                raise broken(f"its last line {line[:60]!r} was cut off")
            yield from_line(line[:-1])


def _read_database(path: Path) -> Iterator[Record]:
    """Give entries with their checkpoints behind them; a checkpoint without an entry comes last."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute("BEGIN")  # entries and checkpoints of one moment
        checkpoints = iter(connection.execute(_CHECKPOINTS))
        row = next(checkpoints, None)
        for entry in map(_entry_of, connection.execute(_ENTRIES)):
            yield entry
            while row is not None and row[0] <= entry.sequence:
                yield _checkpoint_of(row)
                row = next(checkpoints, None)
        if row is not None:
            yield _checkpoint_of(row)


def _entry_of(row: tuple[int, str, str, str, str, bytes, bytes]) -> Entry:
    with _told(f"entry {row[0]}"):
        details = json.loads(row[4])
        if canonical(details) != row[4]:
            raise ValueError(f"{row[4][:60]!r} is not canonical")
        return Entry(
            sequence=row[0],
            time=row[1],
            kind=row[2],
            subject=row[3],
            details=details,
            previous=row[5],
            hash=row[6],
        )


def _checkpoint_of(row: tuple[int, bytes, str, int, bytes, bytes]) -> Checkpoint:
    with _told(f"the checkpoint of entry {row[0]}"):
        return Checkpoint(
            sequence=row[0],
            hash=row[1],
            time=row[2],
            previous_checkpoint=row[3],
            certificate=row[4],
            signature=row[5],
        )


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        raise broken(f"{what} was altered ({error})") from error
