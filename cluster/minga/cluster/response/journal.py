"""The journal: what was heard, decided and done, in one SQLite file of the project.

Contract: every entry is on the disk before its method returns. Several processes use one file at
once: the responder, the work of a case, and the commands of people. An entry is never changed.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minga.cluster.errors import ResponseError
from minga.cluster.response.alarms import Alarm
from minga.cluster.response.policy import ENDS, Case, Entry, Heard, Kind, cases_of

_VERSION = 1
_TABLES = """
CREATE TABLE story (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, case_number INTEGER,
    kind TEXT NOT NULL, detail TEXT NOT NULL
);
CREATE TABLE alarms (
    fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
    summary TEXT NOT NULL, since REAL NOT NULL, origin TEXT NOT NULL, heard_at REAL NOT NULL
);
CREATE TABLE logs (folder TEXT PRIMARY KEY, read_to INTEGER NOT NULL);
"""
_WAIT_S = 30.0


class Journal:
    """See the module.

    Args:
        path: of the file; it and its folder are made if they are missing.
        clock: seconds since 1970.

    Raises:
        ResponseError: it is no journal, or one of a later version.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._path = path
        self._connection = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        try:
            if self._version() == 0:  # who only reads does not wait for who writes
                with self._writing() as connection:
                    if self._version() == 0:
                        for statement in filter(str.strip, _TABLES.split(";")):
                            connection.execute(statement)
                        connection.execute(f"PRAGMA user_version = {_VERSION}")
            version = self._version()
        except sqlite3.DatabaseError as error:
            raise ResponseError(f"{path} is no journal: {error}; move it away") from error
        if version > _VERSION:
            raise ResponseError(f"{path} was written by a later Minga; use that one")

    def now(self) -> float:
        """Give the journal's time, in seconds since 1970."""
        return self._clock()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def story(self, case: int | None = None) -> tuple[Entry, ...]:
        """Give all entries, oldest first, or those of one case."""
        return (
            self._entries("TRUE", ()) if case is None else self._entries("case_number = ?", (case,))
        )

    def _entries(self, where: str, values: tuple[int, ...]) -> tuple[Entry, ...]:
        # `where` is one of the literals of this class; values are bound.
        rows = self._connection.execute(
            f"SELECT number, at, case_number, kind, detail FROM story WHERE {where}"  # noqa: S608
            " ORDER BY number",
            values,
        )
        return tuple(
            Entry(number=number, at=at, case=of, kind=Kind(kind), detail=json.loads(detail))
            for number, at, of, kind, detail in rows
        )

    def cases(self) -> tuple[Case, ...]:
        """Give all cases, oldest first."""
        return cases_of(self._entries("case_number IS NOT NULL", ()))

    def case(self, number: int) -> Case:
        """Give one case.

        Raises:
            ResponseError: there is none.
        """
        found = cases_of(self.story(number))
        if not found:
            raise ResponseError(f"there is no case {number}; see: minga respond story")
        return found[0]

    def tell(self, kind: Kind, case: int | None = None, **detail: Any) -> None:
        """Add an entry; that a version was promoted is told in any case.

        Raises:
            ResponseError: the case has ended.
        """
        with self._writing():
            if kind is not Kind.PROMOTED:
                self._require_open(case)
            self._add(kind, case, detail)

    def open_case(self, alarms: tuple[Alarm, ...], action: str) -> int:
        """Open a case; gives its number.

        Raises:
            ResponseError: one is open already.
        """
        with self._writing() as connection:
            cases = self.cases()
            if cases and cases[-1].end is None:
                raise ResponseError(f"case {cases[-1].number} is under way; there is one at a time")
            (number,) = connection.execute(
                "SELECT coalesce(max(case_number), 0) + 1 FROM story"
            ).fetchone()
            told = [
                {"name": a.name, "model": a.model, "version": a.version, "since": a.since}
                for a in alarms
            ]
            self._add(Kind.OPENED, number, {"action": action, "alarms": told})
        return int(number)

    def approve(self, number: int, what: str, by: str) -> None:
        """Note that a person agreed to what a case waits for; a second time changes nothing."""
        with self._writing():
            self._require_open(number)
            if what not in self.case(number).approved:
                self._add(Kind.APPROVED, number, {"what": what, "by": by})

    def hold(self, reason: str, until: float | None) -> None:
        """Note why alarms lead to nothing for now, unless that was the last thing noted."""
        with self._writing() as connection:
            detail = {"reason": reason, "until": until}
            row = connection.execute(
                "SELECT kind, detail FROM story WHERE kind != ? ORDER BY number DESC LIMIT 1",
                (Kind.ALARM,),
            ).fetchone()
            if row != (Kind.HELD, json.dumps(detail)):
                self._add(Kind.HELD, None, detail)

    # --- alarms ---

    def read_to(self, folder: Path) -> int:
        """Give the last record of a monitor's log that was taken in; 0 for none."""
        row = self._connection.execute(
            "SELECT read_to FROM logs WHERE folder = ?", (str(folder),)
        ).fetchone()
        return int(row[0]) if row else 0

    def hear(self, alarms: tuple[Alarm, ...], read_to: tuple[Path, int] | None = None) -> None:
        """Take alarms in: new ones and ends are entries, repetitions only say when.

        Args:
            alarms: in the order in which they came.
            read_to: the monitor's log that they are of, and its last record.
        """
        with self._writing() as connection:
            if read_to is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO logs VALUES (?, ?)", (str(read_to[0]), read_to[1])
                )
            for alarm in alarms:
                row = connection.execute(
                    "SELECT since FROM alarms WHERE fingerprint = ?", (alarm.fingerprint,)
                ).fetchone()
                if alarm.is_firing:
                    if row is None or row[0] != alarm.since:
                        self._add(Kind.ALARM, None, _told(alarm))
                    self._remember(alarm)
                elif row is not None:
                    self._add(Kind.RESOLVED, None, _told(alarm))
                    connection.execute(
                        "DELETE FROM alarms WHERE fingerprint = ?", (alarm.fingerprint,)
                    )

    def forget_versions(self, *, but: int) -> None:
        """Drop alarms about versions that are champion no more: nobody will say that they ended."""
        with self._writing() as connection:
            connection.execute("DELETE FROM alarms WHERE version NOT IN ('', ?)", (str(but),))

    def firing(self) -> tuple[Heard, ...]:
        """Give the alarms that are not over, and when each was last told."""
        rows = self._connection.execute(
            "SELECT fingerprint, name, model, version, summary, since, origin, heard_at FROM alarms"
        )
        return tuple(
            Heard(
                alarm=Alarm(
                    fingerprint=fingerprint,
                    name=name,
                    model=model,
                    version=version,
                    summary=summary,
                    since=since,
                    is_firing=True,
                    origin=origin,
                ),
                at=heard_at,
            )
            for fingerprint, name, model, version, summary, since, origin, heard_at in rows
        )

    # --- inside ---

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction; what other processes wrote is seen from its begin on."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _add(self, kind: Kind, case: int | None, detail: Any) -> None:
        self._connection.execute(
            "INSERT INTO story (at, case_number, kind, detail) VALUES (?, ?, ?, ?)",
            (self._clock(), case, kind, json.dumps(detail)),
        )

    def _remember(self, alarm: Alarm) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO alarms VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                alarm.fingerprint,
                alarm.name,
                alarm.model,
                alarm.version,
                alarm.summary,
                alarm.since,
                alarm.origin,
                self._clock(),
            ),
        )

    def _require_open(self, case: int | None) -> None:
        if case is None:
            return
        end = self.case(case).end
        if end in ENDS:
            raise ResponseError(f"case {case} has ended: {end}; see: minga respond story")


def _told(alarm: Alarm) -> dict[str, Any]:
    return {
        "name": alarm.name,
        "model": alarm.model,
        "version": alarm.version,
        "summary": alarm.summary,
        "since": alarm.since,
        "origin": alarm.origin,
    }
