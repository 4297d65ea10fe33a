"""The tables of the coordinator's database, and how a file of an older version gets them.

`PRAGMA user_version` says how many of `STEPS` a file has taken. Opening it takes the others, in
order, each in one transaction with its number: a coordinator that is killed in between goes on
there. Steps only lead forward. One that was released is never changed; whatever comes later is a
step of its own at the end. A file that has taken more steps than this version knows is refused,
untouched: this version could not tell what it would break.

Enrolment tokens and the audit log keep their own tables in the same file (`token_table`,
`audit_log`); steps that change those belong here too.
"""

import sqlite3
from collections.abc import Callable
from typing import Final

from minga.federation.errors import StorageError

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS devices (
    device_id TEXT PRIMARY KEY,
    group_name TEXT NOT NULL,
    key_digest BLOB NOT NULL UNIQUE,
    enrolled_at REAL NOT NULL,
    last_seen_at REAL,
    revoked_at REAL,
    trains INTEGER NOT NULL DEFAULT 0,
    agent_version TEXT NOT NULL DEFAULT '',
    model BLOB,
    rounds_counted INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS campaigns (
    campaign_id TEXT PRIMARY KEY,
    started_at REAL NOT NULL,
    plan BLOB NOT NULL,
    state INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    model_digest BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    round_id TEXT PRIMARY KEY,
    campaign_id TEXT NOT NULL REFERENCES campaigns (campaign_id),
    number INTEGER NOT NULL,
    started_at REAL NOT NULL,
    invited TEXT NOT NULL,
    invite BLOB NOT NULL,
    record BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS round_events (
    round_id TEXT NOT NULL REFERENCES rounds (round_id),
    sequence INTEGER NOT NULL,
    at REAL NOT NULL,
    device_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (round_id, sequence)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS published_models (
    group_name TEXT NOT NULL,
    name TEXT NOT NULL,
    offer BLOB NOT NULL,
    published_at REAL NOT NULL,
    PRIMARY KEY (group_name, name)
) STRICT;
"""


def _tables(connection: sqlite3.Connection) -> None:
    """Make the tables; a file from before versions were counted has them."""
    for statement in _TABLES.split(";"):
        connection.execute(statement)


def _optimizer_state(connection: sqlite3.Connection) -> None:
    """Let a campaign keep its optimiser's state; files from before the count may have it."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(campaigns)")}
    if "optimizer_digest" not in columns:
        connection.execute(
            "ALTER TABLE campaigns ADD COLUMN optimizer_digest BLOB NOT NULL DEFAULT x''"
        )


def _privacy(connection: sqlite3.Connection) -> None:
    """Keep what rounds spent of the fleet's privacy."""
    connection.execute(
        "CREATE TABLE privacy_spent (round_id TEXT PRIMARY KEY, spent TEXT NOT NULL) STRICT"
    )


STEPS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (
    _tables,
    _optimizer_state,
    _privacy,
)
"""Step n makes a file of version n - 1 one of version n."""


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database to the newest version.

    Args:
        connection: The open database, in autocommit mode and outside a transaction.

    Raises:
        StorageError: the file is of a newer version than this code.
        sqlite3.Error: it cannot be changed; it is as it was after its last whole step.
    """
    version = _version_of(connection)
    if version > len(STEPS):
        raise StorageError(
            f"the coordinator's database has version {version}, and this Minga knows versions up "
            f"to {len(STEPS)}: a newer Minga has used it; run that one, or restore a backup"
        )
    for number in range(version + 1, len(STEPS) + 1):
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            STEPS[number - 1](connection)
            connection.execute(f"PRAGMA user_version = {number}")


def _version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
