"""Windows over all replicas, on the disk; the alarm log that others read."""

import sqlite3

import pytest

from minga.inference.errors import MonitorError
from minga.inference.monitor.alarms import DATABASE_FILE, AlarmLog
from minga.inference.monitor.keeper import Keeper, Windows
from minga.inference.monitor.sketch import Sketch
from minga.inference.monitor.store import Store
from minga.inference.monitor.traffic import Traffic
from tests.serving.watched import logits, reference, rows

SMALL = Windows(rows=500, seconds=600, min_rows=50)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def traffic(num_rows: int, seed: int, *, shift: float = 0.0, version: str = "1") -> Traffic:
    """Count some requests, as one replica does."""
    table = rows(num_rows, seed, shift=shift)
    sketch = Sketch(reference())
    sketch.add(table, logits(table))
    return Traffic(model="yes-or-no", version=version, began=1000.0, sketch=sketch)


def keeper_of(folder, clock, heard=None):
    """Open a keeper; it appends the alarms that it tells of."""
    told = [] if heard is None else heard
    return Keeper(folder, SMALL, on_alarm=told.append, clock=clock)


def test_a_window_is_what_all_replicas_sent(tmp_path, clock):
    """Sketches of several replicas fill one window, which is judged when it has its rows."""
    with keeper_of(tmp_path, clock) as keeper:
        for seed in range(4):
            summaries = keeper.take([traffic(100, seed)])
        assert summaries == ()
        (summary,) = keeper.take([traffic(60, 5), traffic(60, 6)])
    assert (summary.windows, summary.rows, summary.open_rows) == (1, 520, 0)
    assert {row.subject for row in summary.findings if row.kind == "drift"} == {
        "first",
        "second",
        "third",
        "kind",
    }
    assert set(summary.estimates) == {"accuracy", "f1", "roc_auc", "average_precision"}


def test_drift_is_one_alarm_until_it_is_over(tmp_path, clock):
    """Five shifted windows raise one alarm of the column, two usual ones clear it."""
    heard = []
    with keeper_of(tmp_path, clock, heard) as keeper:
        for number in range(9):
            clock.now += 10
            keeper.take([traffic(500, number, shift=0.5 if 2 <= number < 7 else 0.0)])
    log = AlarmLog(tmp_path)
    drift = [alarm for alarm in log.read() if (alarm.kind, alarm.subject) == ("drift", "first")]
    assert [(alarm.is_raised, alarm.window) for alarm in drift] == [(True, 4), (False, 9)]
    assert drift[0].until == 1040.0
    assert "input 'first' has drifted" in str(drift[0])
    assert list(log.read()) == heard
    assert log.standing() == ()
    assert log.read(after=heard[-1].sequence) == ()
    assert log.read(model="another") == ()


def test_a_restart_goes_on_with_the_open_window(tmp_path, clock):
    """Killed at any row, the keeper goes on: nothing is lost, no alarm comes twice."""
    heard = []
    for number in range(12):
        keeper = keeper_of(tmp_path, clock, heard)
        keeper.take([traffic(250, number, shift=0.6)])
        # Not closed: as after SIGKILL, only what is on the disk is left.
    (summary,) = keeper_of(tmp_path, clock).take([])
    assert (summary.windows, summary.rows, summary.open_rows) == (6, 500, 0)
    subjects = [(alarm.kind, alarm.subject) for alarm in heard]
    assert len(subjects) == len(set(subjects))
    assert ("drift", "first") in subjects
    assert [alarm.sequence for alarm in AlarmLog(tmp_path).read()] == [
        alarm.sequence for alarm in heard
    ]


def test_thin_traffic_is_judged_by_the_clock(tmp_path, clock):
    """A window is full at its age, if it has rows enough to tell anything."""
    with keeper_of(tmp_path, clock) as keeper:
        keeper.take([traffic(30, 1)])
        clock.now += 700
        (summary,) = keeper.take([])
        assert (summary.windows, summary.open_rows) == (0, 30)
        keeper.take([traffic(25, 2)])
        clock.now += 20
        (summary,) = keeper.take([])
    assert (summary.windows, summary.rows) == (1, 55)


def test_versions_have_windows_of_their_own(tmp_path, clock):
    """A new version begins anew; what the old one did is kept."""
    with keeper_of(tmp_path, clock) as keeper:
        keeper.take([traffic(300, 1), traffic(300, 2, version="2")])
        clock.now += 60
        summaries = keeper.take([traffic(300, 3)])
    assert [(one.version, one.windows, one.open_rows) for one in summaries] == [
        ("1", 1, 0),
        ("2", 0, 300),
    ]


def test_alarms_are_only_ever_added(tmp_path, clock):
    """The database itself refuses to change or remove what is in the log."""
    with keeper_of(tmp_path, clock) as keeper:
        for number in range(2):
            keeper.take([traffic(500, number, shift=1.0)])
    connection = sqlite3.connect(tmp_path / DATABASE_FILE)
    for statement in ("UPDATE alarms SET model = 'x'", "DELETE FROM alarms"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            connection.execute(statement)
    connection.close()


def test_unusable_folders_are_told(tmp_path):
    """A folder that cannot be used is an error with a remedy; a log that is none yet is empty."""
    (tmp_path / "file").write_text("")
    with pytest.raises(MonitorError, match="check the folder's rights"):
        Keeper(tmp_path / "file")
    assert AlarmLog(tmp_path / "nowhere").read() == ()
    (tmp_path / DATABASE_FILE).write_text("no database, but long enough to be read as one" * 50)
    with pytest.raises(MonitorError, match="cannot be"):
        Store(tmp_path)
    with pytest.raises(MonitorError, match="cannot be read"):
        AlarmLog(tmp_path).read()


def test_a_newer_database_is_left_alone(tmp_path):
    """A file of a newer Minga is refused and not changed."""
    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / DATABASE_FILE)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(MonitorError, match="newer Minga"):
        Store(tmp_path)
