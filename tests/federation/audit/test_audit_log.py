"""The log in the coordinator's database: transactions, checkpoints, limits, reading."""

import shutil
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minga.federation import audit
from minga.federation.audit import AUDITOR, Checkpoint, Entry
from minga.federation.coordinator.audit_log import AuditLog, Kind, read_log
from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.credentials import OwnIdentity
from minga.federation.coordinator.store import Store
from minga.federation.errors import AuditError, FederationError, StorageError
from minga.federation.identity import Role, utc_now
from minga.federation.limits import (
    AUDIT_CHECKPOINT_ENTRIES,
    AUDIT_CHECKPOINT_S,
    AUDITED_REFUSALS_PER_MINUTE,
)


class Office:
    """A store with its audit log, a clock that stands still, and the authority."""

    def __init__(self, folder: Path) -> None:
        self.now = utc_now()
        self.authority = Authority.open(folder / "authority", clock=self.clock)
        self.auditor = OwnIdentity(self.authority, folder / AUDITOR, Role.SERVICE, AUDITOR)
        self.path = folder / "coordinator.db"
        self.open()

    def open(self) -> None:
        """Open the database."""
        self.store = Store(self.path)
        self.log = AuditLog(self.store, signer=self.auditor.current, clock=self.clock)

    def clock(self) -> datetime:
        """Give the time."""
        return self.now

    def enrol(self, name: str) -> int:
        """Register a device, with the entry that tells of it."""
        with self.store.transaction():
            self.store.register_device(name, "line-3", name.encode(), 0.0)
            self.log.append(Kind.DEVICE_ENROLLED, f"device/{name}", group="line-3")
        return 0

    def entries(self) -> list[Entry]:
        """Read all entries."""
        return [record for record in read_log(self.path) if isinstance(record, Entry)]

    def checkpoints(self) -> list[int]:
        """Say which entries are signed."""
        records = read_log(self.path)
        return [record.sequence for record in records if isinstance(record, Checkpoint)]

    def verify(self, path: Path | None = None) -> audit.Report:
        """Verify the log, or another file."""
        return audit.verify(read_log(path or self.path), self.authority.certificate)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    """An empty log."""
    office = Office(tmp_path)
    yield office
    office.store.close()


# -- writing ----------------------------------------------------------------------------------


def test_an_entry_and_its_event_are_one(office: Office) -> None:
    """A transaction that fails takes its entry with it, and the chain goes on as if never."""
    office.log.append(Kind.COORDINATOR_STARTED, "coordinator")
    with pytest.raises(ZeroDivisionError), office.store.transaction():
        1 / office.enrol("press-7")
    assert office.store.device("press-7") is None
    office.enrol("press-8")
    assert [entry.subject for entry in office.entries()] == ["coordinator", "device/press-8"]
    assert office.verify().num_entries == 2


def test_an_event_whose_entry_fails_has_not_happened(office: Office) -> None:
    """A disk that takes the event and not the entry keeps neither."""
    office.store.connection.execute(
        "CREATE TRIGGER full BEFORE INSERT ON audit_log BEGIN SELECT RAISE(ABORT, 'full'); END"
    )
    with pytest.raises(StorageError, match="full"):
        office.enrol("press-7")
    assert office.store.device("press-7") is None


@pytest.mark.parametrize("change", ["UPDATE audit_log SET kind = 'x'", "DELETE FROM audit_log"])
def test_written_entries_stay(office: Office, change: str) -> None:
    """The database itself refuses to change or delete, against mistakes."""
    office.log.append(Kind.COORDINATOR_STARTED, "coordinator")
    with pytest.raises(sqlite3.DatabaseError, match="append-only"):
        office.store.connection.execute(change)


def test_checkpoints_come_by_number_time_and_end(office: Office) -> None:
    """Every so many entries, after a while, and when the coordinator stops; never twice."""
    for _ in range(AUDIT_CHECKPOINT_ENTRIES + 5):
        office.log.append(Kind.COORDINATOR_STARTED, "coordinator")
    assert office.checkpoints() == [100]
    office.log.tend()
    assert office.checkpoints() == [100]
    office.now += timedelta(seconds=AUDIT_CHECKPOINT_S)
    office.log.tend()
    office.log.tend()
    assert office.checkpoints() == [100, 105]
    office.log.append(Kind.COORDINATOR_STOPPED, "coordinator")
    office.log.close()
    office.log.close()
    assert office.checkpoints() == [100, 105, 106]
    assert office.verify().signed_until == 106


def test_the_chain_goes_on_after_a_crash(office: Office) -> None:
    """Entries that were not signed are there at the next start and are signed then."""
    office.log.append(Kind.COORDINATOR_STARTED, "coordinator")
    office.store.close()
    office.open()
    office.log.append(Kind.COORDINATOR_STARTED, "coordinator")
    office.log.sign()
    report = office.verify()
    assert (report.num_entries, report.signed_until) == (2, 2)


@pytest.mark.parametrize("days", [25, 400, -3])
def test_the_signer_s_certificate_is_always_valid(office: Office, days: int) -> None:
    """It is issued anew when it is due, when the coordinator slept, when the clock is set back."""
    office.log.append(Kind.COORDINATOR_STARTED, "coordinator")
    office.log.sign()
    office.now += timedelta(days=days)
    office.log.append(Kind.COORDINATOR_STOPPED, "coordinator")
    office.log.sign()
    first, second = [r for r in read_log(office.path) if isinstance(r, Checkpoint)]
    assert first.certificate != second.certificate
    assert office.verify().signed_until == 2


# -- limits -----------------------------------------------------------------------------------


def test_refusals_do_not_fill_the_disk(office: Office) -> None:
    """A few are written for each outsider, the rest is counted and told in one entry."""
    for _ in range(100_000):
        office.log.append_limited(Kind.MESSAGE_REFUSED, "device/mallory", reason="nonsense")
    office.log.append_limited(Kind.MESSAGE_REFUSED, "device/eve", reason="nonsense")
    assert len(office.entries()) == AUDITED_REFUSALS_PER_MINUTE + 1
    office.log.tend()
    assert len(office.entries()) == AUDITED_REFUSALS_PER_MINUTE + 1
    office.now += timedelta(seconds=61)
    office.log.tend()
    last = office.entries()[-1]
    assert (last.subject, dict(last.details)) == ("device/mallory", {"more": 99_990})
    office.log.append_limited(Kind.MESSAGE_REFUSED, "device/mallory", reason="again")
    assert office.entries()[-1].details == {"reason": "again"}


def test_counted_refusals_are_told_at_the_end(office: Office) -> None:
    """Also those of a minute that is not over when the coordinator stops."""
    for _ in range(AUDITED_REFUSALS_PER_MINUTE + 3):
        office.log.append_limited(Kind.ACCESS_REFUSED, "stranger", reason="no certificate")
    office.log.close()
    assert office.entries()[-1].details == {"more": 3}
    assert office.verify().signed_until == AUDITED_REFUSALS_PER_MINUTE + 1


# -- reading ----------------------------------------------------------------------------------


@pytest.fixture
def signed(office: Office) -> Office:
    """A log of 7 entries that is signed at entry 3 and at its end."""
    for number in range(7):
        office.log.append(Kind.DEVICE_ENROLLED, f"device/press-{number}", group="line-3")
        if number == 2:
            office.log.sign()
    office.log.close()
    return office


def test_export_and_database_say_the_same(signed: Office, tmp_path: Path) -> None:
    """A log is the same log in either form; the coordinator may run meanwhile."""
    export = tmp_path / "audit.jsonl"
    export.write_text("".join(audit.to_line(r) + "\n" for r in read_log(signed.path)))
    assert list(read_log(export)) == list(read_log(signed.path))
    assert signed.verify(export) == signed.verify()


def test_a_copy_is_read_without_the_coordinator(signed: Office, tmp_path: Path) -> None:
    """A database that was closed is one file."""
    signed.store.close()
    copy = tmp_path / "elsewhere" / "copy.db"
    copy.parent.mkdir()
    shutil.copy(signed.path, copy)
    assert signed.verify(copy).num_entries == 7
    signed.open()


COLUMNS = ["sequence", "time", "kind", "subject", "details", "previous", "hash"]
VALUES = st.one_of(
    st.text(max_size=20), st.binary(max_size=40), st.integers(-(2**63), 2**63 - 1), st.none()
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(data=st.data())
def test_any_change_in_the_database_is_found(
    signed: Office, tmp_path: Path, data: st.DataObject
) -> None:
    """By whoever writes to the file: any cell, any removal but at the end, any swap."""
    copy = tmp_path / "copy.db"
    copy.unlink(missing_ok=True)
    connection = sqlite3.connect(signed.path)
    connection.execute("VACUUM INTO ?", (str(copy),))
    connection.close()
    with sqlite3.connect(copy) as connection:
        attack(connection, data)
    connection.close()
    with pytest.raises((AuditError, FederationError)) as caught:
        signed.verify(copy)
    assert isinstance(caught.value, AuditError)


def attack(connection: sqlite3.Connection, data: st.DataObject) -> None:
    """Take the guards away, then do one bad thing."""
    rows = connection.execute("SELECT * FROM audit_log ORDER BY sequence").fetchall()
    connection.execute("DROP TABLE audit_log")
    connection.execute(f"CREATE TABLE audit_log ({', '.join(COLUMNS)})")  # takes any type
    victim = data.draw(st.integers(0, len(rows) - 1))
    match data.draw(st.sampled_from(["cell", "remove", "swap", "insert"])):
        case "cell":
            column = data.draw(st.integers(0, len(COLUMNS) - 1))
            value = data.draw(VALUES.filter(lambda v: v != rows[victim][column]))
            row = list(rows[victim])
            row[column] = value
            rows[victim] = tuple(row)
        case "remove":
            del rows[victim]
        case "swap":
            other = data.draw(st.integers(0, len(rows) - 1).filter(lambda n: n != victim))
            one, two = rows[victim], rows[other]
            rows[victim], rows[other] = (one[0], *two[1:]), (two[0], *one[1:])
        case "insert":
            rows.append((8, *rows[victim][1:]))
    connection.executemany("INSERT INTO audit_log VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def test_a_cut_export_is_told(signed: Office, tmp_path: Path) -> None:
    """A line that ends in the middle is no line."""
    export = tmp_path / "audit.jsonl"
    text = "".join(audit.to_line(r) + "\n" for r in read_log(signed.path))
    export.write_text(text[:-1])
    with pytest.raises(AuditError, match="cut off"):
        signed.verify(export)


def test_what_cannot_be_read_is_no_broken_log(office: Office, tmp_path: Path) -> None:
    """A missing file or a database of something else says what to name, with another code."""
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    connection.close()
    for name in ("missing.db", "other.db"):
        with pytest.raises(FederationError, match="name a coordinator's state folder") as caught:
            office.verify(tmp_path / name)
        assert not isinstance(caught.value, AuditError)
