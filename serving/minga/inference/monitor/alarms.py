"""The alarm log: what the monitor has noticed, for people and for programs that act on it.

This is a stable interface. An alarm is raised once, when what it is about has counted in two
windows in a row, and cleared once, when it has not counted in two. Each change is one record with
a sequence number that only rises; records are never changed or removed, which the database itself
refuses. Whoever acts on alarms remembers the last number it has dealt with and asks for what came
after, so that it misses nothing and does nothing twice, also over restarts of either side.

    log = AlarmLog(folder)
    for alarm in log.read(after=last):
        ...
        last = alarm.sequence

`since` and `until` bound the traffic that shows it, which is the window of new data to retrain on.
"""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from minga.inference.errors import MonitorError
from minga.inference.monitor.judgement import AlarmKind

DATABASE_FILE: Final = "monitor.db"
"""Its name in the monitor's folder."""

ALARM_TABLE: Final = """
CREATE TABLE IF NOT EXISTS alarms (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    model TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS alarms_are_not_changed BEFORE UPDATE ON alarms
BEGIN SELECT RAISE(ABORT, 'alarms are only ever added'); END;
CREATE TRIGGER IF NOT EXISTS alarms_are_not_removed BEFORE DELETE ON alarms
BEGIN SELECT RAISE(ABORT, 'alarms are only ever added'); END;
"""

_WORDS: Final[dict[AlarmKind, str]] = {
    AlarmKind.DRIFT: "input '{0}' has drifted",
    AlarmKind.PREDICTION_DRIFT: "prediction '{0}' has drifted",
    AlarmKind.MISSING: "input '{0}' is missing more often",
    AlarmKind.RANGE: "input '{0}' is outside of what the training data has",
    AlarmKind.CATEGORY: "input '{0}' has categories that training never saw",
    AlarmKind.OUTLIERS: "more {0} are far from the training data",
    AlarmKind.ESTIMATED_PERFORMANCE: "{0} is estimated to be worse than on the test split",
    AlarmKind.PERFORMANCE: "{0} is worse than on the test split",
    AlarmKind.CONCEPT_DRIFT: "the model's {0} have changed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One record of the log.

    Attributes:
        sequence: its number in the log, from 1; 0 before it is in the log.
        at: when it was written, in seconds since 1970.
        model: the model's name.
        version: the version that answered.
        kind: what it is about.
        subject: the column; the measure; `rows` of outliers; `errors` of concept drift.
        is_raised: whether the alarm begins with this record, or ends.
        window: the number of the window that decided.
        since: when the first window began that shows it, in seconds since 1970.
        until: when the last one ended.
        rows: of the window that decided.
        statistic: psi, shift, share, loss, or adwin.
        value: of the statistic.
        limit: from which on it is large.
        p_value: the probability of so much by luck, if nothing had changed.
    """

    sequence: int = 0
    at: float
    model: str
    version: str
    kind: AlarmKind
    subject: str
    is_raised: bool
    window: int
    since: float
    until: float
    rows: int
    statistic: str
    value: float
    limit: float
    p_value: float

    def __str__(self) -> str:
        words = _WORDS[self.kind].format(self.subject)
        figures = f"{self.statistic} {self.value:.3g} (limit {self.limit:.3g})"
        state = "" if self.is_raised else "no longer: "
        return f"model '{self.model}' version {self.version}: {state}{words}; {figures}"

    def to_json(self) -> dict[str, Any]:
        """Give the record as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(**{**given, "kind": AlarmKind(given["kind"])})


class AlarmLog:
    """Reads the alarms of one monitor; several processes may, while the monitor writes.

    Args:
        folder: the monitor's, `.minga/monitor` in a project unless configured otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / DATABASE_FILE

    def read(self, *, after: int = 0, model: str = "", limit: int = 1000) -> tuple[Alarm, ...]:
        """Give the alarms after a sequence number, the oldest first.

        Args:
            after: the last number that is known already.
            model: only of this model; all if empty.
            limit: the most alarms at once.

        Returns:
            None at all if the monitor has not begun yet.

        Raises:
            MonitorError: the log cannot be read.
        """
        return self._select(
            "SELECT sequence, record FROM alarms WHERE sequence > ? AND ? IN ('', model) "
            "ORDER BY sequence LIMIT ?",
            (after, model, limit),
        )

    def standing(self) -> tuple[Alarm, ...]:
        """Give the alarms that were raised and not cleared since, the oldest first.

        Raises:
            MonitorError: the log cannot be read.
        """
        newest: dict[tuple[str, str, str, str], Alarm] = {}
        for alarm in self._select("SELECT sequence, record FROM alarms ORDER BY sequence", ()):
            key = (alarm.model, alarm.version, alarm.kind.value, alarm.subject)
            newest.pop(key, None)
            if alarm.is_raised:
                newest[key] = alarm
        return tuple(newest.values())

    def _select(self, query: str, arguments: tuple[object, ...]) -> tuple[Alarm, ...]:
        if not self._file.is_file():
            return ()
        uri = f"{self._file.absolute().as_uri()}?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                rows = connection.execute(query, arguments).fetchall()
        except sqlite3.Error as error:
            raise MonitorError(f"the alarm log {self._file} cannot be read: {error}") from error
        return tuple(alarm_of(sequence, record) for sequence, record in rows)


def alarm_of(sequence: int, record: str) -> Alarm:
    """Read a row of the log."""
    return Alarm.from_json({**json.loads(record), "sequence": sequence})


OnAlarm = Callable[[Alarm], None]
"""Hears of each alarm in the process that judges, after it is in the log."""
