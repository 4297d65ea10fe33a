"""What the monitor remembers, in one SQLite file.

The contract: every method is one transaction, and it is on the disk when the method returns; if it
raises `MonitorError` nothing has changed. A window that is closed is there together with the alarms
that it raised, or neither is, so that a restart raises nothing twice and loses no full window.

One process judges traffic; `minga watch labels` may join labels from another one meanwhile. Each
reads what it changes inside the transaction that changes it.

There are never rows of inputs here. What a model answered is kept for requests that have an id,
the newest `MAX_PREDICTIONS` of them, until a label comes.
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from minga.inference.errors import MonitorError
from minga.inference.monitor.alarms import ALARM_TABLE, DATABASE_FILE, Alarm
from minga.inference.monitor.judgement import Key, Streak
from minga.inference.monitor.reference import Reference

MAX_PREDICTIONS: Final = 200_000
MAX_WINDOWS: Final = 200
"""How many closed windows of each version and source are kept."""

MAX_ERRORS: Final = 10_000
"""How many of the newest errors of a version are kept, for concept drift."""

_LAYOUT: Final = 1
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS models (
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    source TEXT NOT NULL,
    reference TEXT NOT NULL,
    began REAL,
    open TEXT NOT NULL,
    number INTEGER NOT NULL,
    streaks TEXT NOT NULL,
    PRIMARY KEY (model, version, source)
) STRICT;
CREATE TABLE IF NOT EXISTS profiles (digest TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS windows (
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    source TEXT NOT NULL,
    number INTEGER NOT NULL,
    began REAL NOT NULL,
    ended REAL NOT NULL,
    rows INTEGER NOT NULL,
    content TEXT NOT NULL,
    judgement TEXT NOT NULL,
    PRIMARY KEY (model, version, source, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS predictions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    request TEXT NOT NULL,
    place INTEGER NOT NULL,
    score REAL NOT NULL,
    answer REAL NOT NULL,
    UNIQUE (model, request, place)
) STRICT;
CREATE TABLE IF NOT EXISTS errors (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    error REAL NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model answered for one row of a request that has an id.

    Attributes:
        request: the caller's id.
        place: the row's number in the request, from 0.
        score: what the answer was chosen by; see `sketch.scores_of`.
        answer: the class that was chosen, or the number that was answered.
    """

    request: str
    place: int
    score: float
    answer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """The state of one version by one source, `traffic` or `labels`.

    Attributes:
        model: its name.
        version: of it.
        source: what fills its windows.
        reference: digest of what it is compared with.
        began: when the open window began; None if it is empty.
        open: its content.
        number: of the open window, from 1.
        streaks: see `judgement.follow`.
    """

    model: str
    version: str
    source: str
    reference: str
    began: float | None
    open: dict[str, Any]
    number: int
    streaks: dict[Key, Streak]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRow:
    """A closed window.

    Attributes:
        model: its name.
        version: of it.
        source: what filled it.
        number: from 1, without gaps.
        began: in seconds since 1970.
        ended: in seconds since 1970.
        rows: how many it has.
        content: a sketch, or what labels came to.
        judgement: what it came to.
    """

    model: str
    version: str
    source: str
    number: int
    began: float
    ended: float
    rows: int
    content: dict[str, Any]
    judgement: dict[str, Any]


class Store:
    """The monitor's SQLite file; may be used by several threads in turn.

    Args:
        folder: is made if it is missing.

    Raises:
        MonitorError: the file cannot be opened, or is of a newer Minga.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / DATABASE_FILE
        self._turns = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(
                self._file, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._make_tables()
        except (sqlite3.Error, OSError) as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file."""
        with self._turns:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make several changes one: all or none; inside another transaction, part of that one."""
        with self._turns:
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                with self._connection:
                    yield
            except sqlite3.Error as error:
                raise self._error(error) from error

    def keep_reference(self, reference: Reference) -> None:
        """Remember what models are compared with."""
        with self.transaction():
            self._connection.execute(
                "INSERT OR IGNORE INTO profiles VALUES (?, ?)", (reference.digest, reference.text)
            )

    def reference(self, digest: str) -> Reference | None:
        """Give what was remembered under a digest."""
        row = self._one("SELECT text FROM profiles WHERE digest = ?", digest)
        return None if row is None else Reference.parse(row[0])

    def watched(self) -> tuple[Watched, ...]:
        """Give the state of everything that was ever watched."""
        return tuple(_watched(row) for row in self._all("SELECT * FROM models ORDER BY 1, 2, 3"))

    def state(self, model: str, version: str, source: str) -> Watched | None:
        """Give the state of one version."""
        row = self._one(
            "SELECT * FROM models WHERE model = ? AND version = ? AND source = ?",
            model,
            version,
            source,
        )
        return None if row is None else _watched(row)

    def put(self, state: Watched) -> None:
        """Remember a state in the place of the one before."""
        streaks = [
            [*key, streak.is_raised, streak.length, streak.since]
            for key, streak in state.streaks.items()
        ]
        with self.transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    state.model,
                    state.version,
                    state.source,
                    state.reference,
                    state.began,
                    json.dumps(state.open),
                    state.number,
                    json.dumps(streaks),
                ),
            )

    def close_window(
        self, window: WindowRow, after: Watched, alarms: Iterable[Alarm]
    ) -> list[Alarm]:
        """Keep a full window, the state after it, and its alarms, which come back numbered."""
        with self.transaction():
            self._connection.execute(
                "INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    window.model,
                    window.version,
                    window.source,
                    window.number,
                    window.began,
                    window.ended,
                    window.rows,
                    json.dumps(window.content),
                    json.dumps(window.judgement),
                ),
            )
            self._connection.execute(
                "DELETE FROM windows WHERE model = ? AND version = ? AND source = ? "
                "AND number <= ?",
                (window.model, window.version, window.source, window.number - MAX_WINDOWS),
            )
            self.put(after)
            return [self._append(alarm) for alarm in alarms]

    def windows(self, state: Watched, *, last: int = MAX_WINDOWS) -> tuple[WindowRow, ...]:
        """Give the newest closed windows of a version, the oldest of them first."""
        rows = self._all(
            "SELECT * FROM windows WHERE model = ? AND version = ? AND source = ? "
            "ORDER BY number DESC LIMIT ?",
            state.model,
            state.version,
            state.source,
            last,
        )
        return tuple(
            WindowRow(
                **dict(zip(WindowRow.__slots__, row[:7], strict=False)),
                content=json.loads(row[7]),
                judgement=json.loads(row[8]),
            )
            for row in reversed(rows)
        )

    def count_rows(self, model: str, version: str) -> int:
        """Give how many rows the closed windows of a version's traffic have had.

        Windows that are forgotten count as much as the others on average.
        """
        rows, kept, last = self._one(
            "SELECT coalesce(sum(rows), 0), count(*), coalesce(max(number), 0) FROM windows "
            "WHERE model = ? AND version = ? AND source = 'traffic'",
            model,
            version,
        )
        return round(rows * last / kept) if kept else 0

    def count_alarms(self) -> Mapping[tuple[str, str, str], int]:
        """Give how many alarms were raised, by model, version and kind."""
        rows = self._all(
            "SELECT model, json_extract(record, '$.version'), json_extract(record, '$.kind'), "
            "count(*) FROM alarms WHERE json_extract(record, '$.is_raised') GROUP BY 1, 2, 3"
        )
        return {(model, version, kind): count for model, version, kind, count in rows}

    def keep_predictions(self, model: str, version: str, predictions: Iterable[Prediction]) -> None:
        """Remember answers until their labels come; an id that is used again counts anew."""
        rows = [
            (model, version, one.request, one.place, one.score, one.answer) for one in predictions
        ]
        if not rows:
            return
        with self.transaction():
            cursor = self._connection.executemany(
                "INSERT OR REPLACE INTO predictions "
                "(model, version, request, place, score, answer) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
            newest = cursor.execute("SELECT max(sequence) FROM predictions").fetchone()[0]
            self._connection.execute(
                "DELETE FROM predictions WHERE sequence <= ?", (newest - MAX_PREDICTIONS,)
            )

    def take_prediction(
        self, model: str, request: str, place: int
    ) -> tuple[str, Prediction] | None:
        """Give an answer with its version, and forget it; None if it is not known (any more)."""
        with self.transaction():
            row = self._connection.execute(
                "DELETE FROM predictions WHERE model = ? AND request = ? AND place = ? "
                "RETURNING version, score, answer",
                (model, request, place),
            ).fetchone()
        if row is None:
            return None
        prediction = Prediction(request=request, place=place, score=row[1], answer=row[2])
        return row[0], prediction

    def add_errors(self, model: str, version: str, errors: Iterable[float]) -> list[float]:
        """Remember errors in their order, and give all that are remembered."""
        with self.transaction():
            self._connection.executemany(
                "INSERT INTO errors (model, version, error) VALUES (?, ?, ?)",
                [(model, version, error) for error in errors],
            )
            self._connection.execute(
                "DELETE FROM errors WHERE model = ? AND version = ? AND sequence NOT IN "
                "(SELECT sequence FROM errors WHERE model = ? AND version = ? "
                "ORDER BY sequence DESC LIMIT ?)",
                (model, version, model, version, MAX_ERRORS),
            )
            rows = self._connection.execute(
                "SELECT error FROM errors WHERE model = ? AND version = ? ORDER BY sequence",
                (model, version),
            ).fetchall()
        return [error for (error,) in rows]

    def forget_errors(self, model: str, version: str, count: int) -> None:
        """Forget the oldest errors, which are of a time before things changed."""
        with self.transaction():
            self._connection.execute(
                "DELETE FROM errors WHERE sequence IN (SELECT sequence FROM errors "
                "WHERE model = ? AND version = ? ORDER BY sequence LIMIT ?)",
                (model, version, count),
            )

    def append(self, alarm: Alarm) -> Alarm:
        """Write an alarm into the log, and give it with its number."""
        with self.transaction():
            return self._append(alarm)

    def _append(self, alarm: Alarm) -> Alarm:
        record = {name: value for name, value in alarm.to_json().items() if name != "sequence"}
        cursor = self._connection.execute(
            "INSERT INTO alarms (model, record) VALUES (?, ?)", (alarm.model, json.dumps(record))
        )
        return replace(alarm, sequence=int(cursor.lastrowid or 0))

    def _make_tables(self) -> None:
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found > _LAYOUT:
            raise MonitorError(
                f"the monitor's database {self._file} is of a newer Minga; upgrade this one"
            )
        # One script in one transaction, so that two processes can begin at the same time.
        self._connection.executescript(
            f"BEGIN IMMEDIATE; {_TABLES} {ALARM_TABLE} PRAGMA user_version = {_LAYOUT}; COMMIT;"
        )

    def _one(self, query: str, *arguments: object) -> Any:
        return next(iter(self._all(query, *arguments)), None)

    def _all(self, query: str, *arguments: object) -> list[Any]:
        with self._turns:
            try:
                return self._connection.execute(query, arguments).fetchall()
            except sqlite3.Error as error:
                raise self._error(error) from error

    def _error(self, error: Exception) -> MonitorError:
        return MonitorError(
            f"the monitor's database {self._file} cannot be used: {error}; "
            "check the folder's rights and free space"
        )


def _watched(row: Any) -> Watched:
    model, version, source, reference, began, content, number, streaks = row
    return Watched(
        model=model,
        version=version,
        source=source,
        reference=reference,
        began=began,
        open=json.loads(content),
        number=number,
        streaks={
            (kind, subject): Streak(is_raised, length, since)
            for kind, subject, is_raised, length, since in json.loads(streaks)
        },
    )
