"""What the coordinator remembers, in one SQLite file.

The contract: every method is one transaction, and it is on the disk when the method returns
(`synchronous=FULL`); if it raises `StorageError` nothing has changed. Two kinds of writing survive
this process at once, but a loss of power only later. What devices say of themselves (`note_*`) they
say again, and a fleet that comes back after a restart must not wait for a disk. And a round's
events (`append_event`) are on the disk after `sync`, or the next change of another kind: nobody is
told what follows from them before, and devices answer again what was forgotten. One coordinator
process owns the file; it is opened by one thread.

An open round is stored as its order and the events it took, in order; `rounds.Round` rebuilds
itself from them. When it is over its record takes the events' place. Order is that of insertion,
never that of a clock, which may be set back.

What a round's devices sent (keys, shares) does not outlast it: deleted rows are overwritten
(`secure_delete`), and the write-ahead log, which still has them, is emptied right after. What the
file system or the disk itself keeps of overwritten blocks is beyond this program.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from minga.federation.coordinator.schema import migrate
from minga.federation.errors import EnrolmentError, StorageError

DATABASE_FILE: Final = "coordinator.db"
"""Its name in the coordinator's state folder."""

_BUSY_TIMEOUT_MS: Final = 5000
"""How long a change waits for another one's end: what Python's sqlite3 takes by default."""

_ALL = -1  # SQLite's word for no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """One enrolled device."""

    device_id: str
    group: str
    key_digest: bytes
    enrolled_at: float
    last_seen_at: float | None
    revoked_at: float | None
    trains: bool
    agent_version: str
    model: bytes | None
    rounds_counted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignRow:
    """One campaign; `plan` is a serialised CampaignPlan.

    `optimizer_digest` names the server optimiser's state after the last committed round; empty if
    it keeps none, or before that round.
    """

    campaign_id: str
    started_at: float
    plan: bytes
    state: int
    reason: str
    model_digest: bytes
    optimizer_digest: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round as ordered; `invite` is a serialised RoundInvite.

    `record` is a serialised Round, for a round that is over.
    """

    round_id: str
    campaign_id: str
    number: int
    started_at: float
    invited: tuple[str, ...]
    invite: bytes
    record: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One event that a round took."""

    at: float
    device_id: str
    kind: str
    payload: bytes


class Store:
    """The coordinator's SQLite file."""

    def __init__(self, path: Path) -> None:
        try:
            self.connection = sqlite3.connect(path, isolation_level=None)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            self.connection.execute("PRAGMA foreign_keys=ON")
            self.connection.execute("PRAGMA secure_delete=ON")
            migrate(self.connection)
            self._empty_log()  # what a round left there that ended when this process was killed
            self._lazy = sqlite3.connect(path, isolation_level=None)
            self._lazy.execute("PRAGMA synchronous=NORMAL")  # no fsync at each commit
            self._lazy.execute("PRAGMA foreign_keys=ON")
        except sqlite3.Error as error:
            raise StorageError(
                f"the coordinator's database {path} cannot be opened: {error}. "
                "Check the folder's rights, or restore the file from a backup."
            ) from error
        self._has_remains = False
        self._log_path = path.with_name(f"{path.name}-wal")
        self._is_ahead_of_disk = False

    def close(self) -> None:
        """Close the file."""
        self._lazy.close()
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make several changes one: all or none; inside another transaction, part of that one."""
        if self.connection.in_transaction:
            yield
            return
        with _storing():
            with self.connection:  # commits, or rolls back what cannot be committed
                self.connection.execute("BEGIN IMMEDIATE")
                yield
            if self._has_remains:
                self._has_remains = not self._empty_log()

    def _empty_log(self) -> bool:
        """Move the write-ahead log into the file and cut it to nothing.

        Returns:
            False if it has to be done later: somebody reads the database at this moment, or the
            disk fails. What was committed before is safe either way.
        """
        try:
            # A reader must not hold up the rounds.
            self.connection.execute("PRAGMA busy_timeout = 0")
            row = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self.connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        except sqlite3.Error:
            return False
        return not row[0]

    def _execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        with _storing():
            return self.connection.execute(sql, values)

    # --- devices ---

    def register_device(self, device_id: str, group: str, key_digest: bytes, at: float) -> None:
        """Enrol a device; again with the same name and key changes nothing.

        Args:
            device_id: its name.
            group: its group.
            key_digest: SHA-256 of its public key.
            at: the time.

        Raises:
            EnrolmentError: the name has another key, the key another name, or it was revoked.
        """
        rows = self._devices("WHERE device_id = ? OR key_digest = ?", (device_id, key_digest))
        if not rows:
            self._execute(
                "INSERT INTO devices (device_id, group_name, key_digest, enrolled_at)"
                " VALUES (?, ?, ?, ?)",
                (device_id, group, key_digest, at),
            )
            return
        row = rows[0]
        if row.device_id != device_id:
            raise EnrolmentError(f"this key is enrolled as {row.device_id!r} already")
        if row.key_digest != key_digest:
            raise EnrolmentError(
                f"the name {device_id!r} belongs to another device; choose another name"
            )
        if row.revoked_at is not None:
            raise EnrolmentError(f"device {device_id!r} was revoked; ask the operator")

    def device(self, device_id: str) -> DeviceRow | None:
        """Give one device."""
        rows = self._devices("WHERE device_id = ?", (device_id,))
        return rows[0] if rows else None

    def devices(self, group: str = "", *, after: str = "", most: int = _ALL) -> list[DeviceRow]:
        """Give the devices of a group, or all, by name; so many of those that sort after a name."""
        where = "WHERE ? IN ('', group_name) AND device_id > ?"
        return self._devices(where, (group, after), most)

    def num_devices(self) -> int:
        """Count the devices."""
        (count,) = self._execute("SELECT count(*) FROM devices").fetchone()
        return int(count)

    def num_enrolled(self) -> int:
        """Count the devices that are not revoked."""
        (count,) = self._execute("SELECT count(*) FROM devices WHERE revoked_at IS NULL").fetchone()
        return int(count)

    def _devices(
        self, where: str, values: Sequence[str | bytes], most: int = _ALL
    ) -> list[DeviceRow]:
        # `where` is one of the literals in this class; values are bound.
        rows = self._execute(
            "SELECT device_id, group_name, key_digest, enrolled_at, last_seen_at, revoked_at,"  # noqa: S608
            f" trains, agent_version, model, rounds_counted FROM devices {where}"
            " ORDER BY device_id LIMIT ?",
            (*values, most),
        )
        return [
            DeviceRow(
                device_id=row[0],
                group=row[1],
                key_digest=row[2],
                enrolled_at=row[3],
                last_seen_at=row[4],
                revoked_at=row[5],
                trains=bool(row[6]),
                agent_version=row[7],
                model=row[8],
                rounds_counted=row[9],
            )
            for row in rows
        ]

    def note_hello(self, device_id: str, *, trains: bool, agent_version: str, at: float) -> None:
        """Remember what a device said of itself when it connected."""
        self._note(
            "trains = ?, agent_version = ?, last_seen_at = ?", trains, agent_version, at, device_id
        )

    def note_seen(self, device_id: str, at: float) -> None:
        """Remember when a device was last heard of."""
        self._note("last_seen_at = ?", at, device_id)

    def note_model(self, device_id: str, report: bytes) -> None:
        """Remember which model a device says it runs."""
        self._note("model = ?", report, device_id)

    def _note(self, change: str, *values: object) -> None:
        # `change` is one of the literals above; values are bound, the device's name last.
        with _storing():
            self._lazy.execute(f"UPDATE devices SET {change} WHERE device_id = ?", values)  # noqa: S608

    def revoke_device(self, device_id: str, at: float) -> bool:
        """Refuse a device from now on; False if there is no such device."""
        cursor = self._execute(
            "UPDATE devices SET revoked_at = coalesce(revoked_at, ?) WHERE device_id = ?",
            (at, device_id),
        )
        return cursor.rowcount == 1

    # --- campaigns ---

    def add_campaign(self, row: CampaignRow) -> None:
        """Store a new campaign."""
        self._execute(
            "INSERT INTO campaigns (campaign_id, started_at, plan, state, reason, model_digest)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (row.campaign_id, row.started_at, row.plan, row.state, row.reason, row.model_digest),
        )

    def end_campaign(self, campaign_id: str, state: int, reason: str) -> None:
        """Store how a campaign ended."""
        self._execute(
            "UPDATE campaigns SET state = ?, reason = ? WHERE campaign_id = ?",
            (state, reason, campaign_id),
        )

    def campaigns(self) -> list[CampaignRow]:
        """Give all campaigns, oldest first."""
        rows = self._execute(
            "SELECT campaign_id, started_at, plan, state, reason, model_digest, optimizer_digest"
            " FROM campaigns ORDER BY rowid"
        )
        return [
            CampaignRow(
                campaign_id=row[0],
                started_at=row[1],
                plan=row[2],
                state=row[3],
                reason=row[4],
                model_digest=row[5],
                optimizer_digest=row[6],
            )
            for row in rows
        ]

    # --- rounds ---

    def add_round(self, row: RoundRow) -> None:
        """Store a new round."""
        self._execute(
            "INSERT INTO rounds (round_id, campaign_id, number, started_at, invited, invite)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                row.round_id,
                row.campaign_id,
                row.number,
                row.started_at,
                json.dumps(row.invited),
                row.invite,
            ),
        )

    def rounds(self, campaign_id: str) -> list[RoundRow]:
        """Give a campaign's rounds in order."""
        rows = self._execute(
            "SELECT round_id, campaign_id, number, started_at, invited, invite, record FROM rounds"
            " WHERE campaign_id = ? ORDER BY rowid",
            (campaign_id,),
        )
        return [
            RoundRow(
                round_id=row[0],
                campaign_id=row[1],
                number=row[2],
                started_at=row[3],
                invited=tuple(json.loads(row[4])),
                invite=row[5],
                record=row[6],
            )
            for row in rows
        ]

    def record(self, round_id: str) -> bytes | None:
        """Give the record of a round that is over."""
        rows = self._execute("SELECT record FROM rounds WHERE round_id = ?", (round_id,)).fetchall()
        return rows[0][0] if rows else None

    def append_event(self, round_id: str, row: EventRow) -> None:
        """Store the next event of a round; it is safe from a loss of power after `sync`."""
        with _storing():
            self._insert_event(self._lazy, round_id, row)
        self._is_ahead_of_disk = True

    def sync(self) -> None:
        """Bring to the disk what `append_event` stored: before anybody is told what follows."""
        if not self._is_ahead_of_disk:
            return
        with _storing(), self._log_path.open("rb") as log:
            os.fsync(log.fileno())
        self._is_ahead_of_disk = False

    def _insert_event(self, connection: sqlite3.Connection, round_id: str, row: EventRow) -> None:
        connection.execute(
            "INSERT INTO round_events (round_id, sequence, at, device_id, kind, payload)"
            " SELECT ?, coalesce(max(sequence), 0) + 1, ?, ?, ?, ?"
            " FROM round_events WHERE round_id = ?",
            (round_id, row.at, row.device_id, row.kind, row.payload, round_id),
        )

    def events(self, round_id: str) -> list[EventRow]:
        """Give a round's events in order."""
        rows = self._execute(
            "SELECT at, device_id, kind, payload FROM round_events WHERE round_id = ?"
            " ORDER BY sequence",
            (round_id,),
        )
        return [EventRow(at=row[0], device_id=row[1], kind=row[2], payload=row[3]) for row in rows]

    def close_round(self, round_id: str, record: bytes) -> None:
        """Store the record of a round that is over in place of its events."""
        with self.transaction():
            self._execute("UPDATE rounds SET record = ? WHERE round_id = ?", (record, round_id))
            self._execute("DELETE FROM round_events WHERE round_id = ?", (round_id,))
            self._has_remains = True

    def commit_round(
        self,
        campaign_id: str,
        round_id: str,
        row: EventRow,
        *,
        model_digest: bytes,
        optimizer_digest: bytes,
        counted: Sequence[str],
    ) -> None:
        """Store a round's result, what the campaign goes on from, and who was counted, at once."""
        with self.transaction():
            self._insert_event(self.connection, round_id, row)
            self._execute(
                "UPDATE campaigns SET model_digest = ?, optimizer_digest = ? WHERE campaign_id = ?",
                (model_digest, optimizer_digest, campaign_id),
            )
            self.connection.executemany(
                "UPDATE devices SET rounds_counted = rounds_counted + 1 WHERE device_id = ?",
                [(device_id,) for device_id in counted],
            )

    # --- privacy ---

    def spend_privacy(self, round_id: str, spent: str) -> None:
        """Store what a round spent; a round spends once."""
        self._execute(
            "INSERT INTO privacy_spent (round_id, spent) VALUES (?, ?)", (round_id, spent)
        )

    def privacy_spent(self) -> dict[str, str]:
        """Give what rounds spent, oldest first: round -> spending."""
        rows = self._execute("SELECT round_id, spent FROM privacy_spent ORDER BY rowid")
        return {row[0]: row[1] for row in rows}

    # --- published models ---

    def publish_model(self, group: str, name: str, offer: bytes, at: float) -> None:
        """Store the version of a model that a group should run."""
        self._execute(
            "INSERT OR REPLACE INTO published_models (group_name, name, offer, published_at)"
            " VALUES (?, ?, ?, ?)",
            (group, name, offer, at),
        )

    def published_models(self) -> list[tuple[str, bytes]]:
        """Give (group, offer), the newest last; an empty group means all devices."""
        rows = self._execute("SELECT group_name, offer FROM published_models ORDER BY rowid")
        return [(row[0], row[1]) for row in rows]


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"the coordinator's database cannot be used ({error}); "
            "free space on its disk, or check the disk"
        ) from error
