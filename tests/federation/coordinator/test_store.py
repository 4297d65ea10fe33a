"""The coordinator's file: versions of its tables, and what deleted rows leave behind."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from minga.federation.audit import Entry
from minga.federation.coordinator import schema
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.rounds import Stage
from minga.federation.coordinator.store import EventRow, RoundRow, Store
from minga.federation.errors import StorageError
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model

VERSION_0 = Path(__file__).parent / "data" / "coordinator_v0.db"
"""Written by commit a6e6975, before versions were counted and optimisers kept a state: three
devices, a campaign of two committed rounds, and a campaign whose round waits for updates."""

SLICE_BYTES = 12
"""So many bytes in a row of a key or share are in two places by no accident."""


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    """A copy of the old coordinator's file."""
    return Path(shutil.copy(VERSION_0, tmp_path / "coordinator.db"))


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def tables_of(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Give the columns of each table: name, type, whether it may be null, default, key."""
    with closing(sqlite3.connect(path)) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
        return {
            name: [row[1:] for row in connection.execute(f"PRAGMA table_info({name})")]
            for name in names
        }


# --- versions ---


def test_an_old_file_is_taken_over(old_file: Path, tmp_path: Path) -> None:
    """Its devices, records and open round are there afterwards, and it works like a new file."""
    assert version_of(old_file) == 0
    store = Store(old_file)
    assert version_of(old_file) == len(schema.STEPS)
    assert [row.rounds_counted for row in store.devices()] == [2, 2, 2]
    done, cut_off = (Campaign.load(store, row) for row in store.campaigns())
    assert (done.state, done.num_committed) == (pb.CAMPAIGN_STATE_COMPLETED, 2)
    assert cut_off.open_round is not None
    assert cut_off.open_round.stage is Stage.UPDATES
    assert cut_off.open_round.missing() == ("site-0", "site-1", "site-2")
    store.commit_round(
        cut_off.campaign_id,
        cut_off.open_round.order.round_id,
        EventRow(at=1.0, device_id="", kind="sum", payload=b"{}"),
        model_digest=b"m" * 32,
        optimizer_digest=b"o" * 32,
        counted=["site-0"],
    )
    assert store.campaigns()[1].optimizer_digest == b"o" * 32
    store.close()
    Store(tmp_path / "new.db").close()
    assert tables_of(old_file).items() >= tables_of(tmp_path / "new.db").items()


async def test_a_coordinator_goes_on_with_an_old_file(old_file: Path) -> None:
    """It takes up the round that the old one left open, and begins an audit log."""
    desk = Desk(old_file.parent)
    desk.start()
    (cut_off,) = (c for c in desk.campaigns.describe() if c.state == pb.CAMPAIGN_STATE_RUNNING)
    assert cut_off.rounds[0].stage == pb.ROUND_STAGE_UPDATES
    desk.campaigns.cancel(cut_off.campaign_id, "operator/operator")
    ended = await desk.finish(cut_off.campaign_id)
    assert ended.rounds[0].stage == pb.ROUND_STAGE_ABORTED
    await desk.stop()
    entries = [record.kind for record in read_log(old_file) if isinstance(record, Entry)]
    assert entries == [Kind.CAMPAIGN_CANCELLED, Kind.ROUND_ABORTED]


@pytest.mark.parametrize("version", range(len(schema.STEPS)))
def test_a_migration_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """A step that fails changes nothing of its own; the steps before it are not taken again."""
    path, step = tmp_path / "coordinator.db", schema.STEPS[version]

    def cut_off(connection: sqlite3.Connection) -> None:
        step(connection)
        raise sqlite3.OperationalError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "STEPS", (*schema.STEPS[:version], cut_off))
        with pytest.raises(StorageError, match="disk is full"):
            Store(path)
    assert version_of(path) == version
    Store(path).close()
    assert version_of(path) == len(schema.STEPS)


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    """A file that a newer version has used is left as it is, and the error names both versions."""
    path = tmp_path / "coordinator.db"
    Store(path).close()
    newer = len(schema.STEPS) + 1
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    before = path.read_bytes()
    with pytest.raises(StorageError, match=f"version {newer}.*up to {newer - 1}.*newer Minga"):
        Store(path)
    assert path.read_bytes() == before


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    """A file of this version takes no step."""
    path = tmp_path / "coordinator.db"
    for _ in range(2):
        Store(path).close()
        assert version_of(path) == len(schema.STEPS)


# --- what is left of rounds ---


def remains(folder: Path, payloads: list[bytes]) -> int:
    """Count the slices of some payloads that a database's files still hold."""
    files = b"".join(path.read_bytes() for path in folder.glob("coordinator.db*"))
    return sum(
        payload[start : start + SLICE_BYTES] in files
        for payload in payloads
        for start in range(0, len(payload) - SLICE_BYTES, SLICE_BYTES)
    )


async def test_nothing_is_left_of_what_devices_sent(tmp_path: Path) -> None:
    """After a round no key, share or signature of it is in the database's files, page or log."""
    desk = Desk(tmp_path)
    for index in range(12):
        desk.enrol(f"site-{index}", 1.0)
    desk.start()
    desk.hold_training()
    desk.connect()
    plan = campaign_plan(cohort=12, min_cohort=9)
    campaign_id = desk.start_campaign(plan, toy_model())
    campaign = await desk.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    events = desk.store.events(campaign.rounds[0].round_id)
    payloads = [event.payload for event in events]
    sent = [secret for payload in payloads for secret in secrets_in(payload)]
    assert len(sent) > 12 * 3
    assert remains(tmp_path, sent) > 0.9 * sum(len(secret) // SLICE_BYTES - 1 for secret in sent)
    desk.release_training()
    ended = await desk.finish(campaign_id)
    assert ended.state == pb.CAMPAIGN_STATE_COMPLETED, ended.reason
    assert remains(tmp_path, sent) == 0
    await desk.stop()


def secrets_in(payload: bytes) -> list[bytes]:
    """Give the keys, commitments and ciphertexts of a device's message; names are no secrets."""
    request = pb.SessionRequest.FromString(payload)
    advert = request.key_advert
    keys = [advert.mask_key, advert.share_key, advert.self_seed_commitment, advert.signature]
    return [key for key in keys if key] + [share.ciphertext for share in request.shares.shares]


def test_a_reader_does_not_hold_up_the_end_of_a_round(tmp_path: Path) -> None:
    """While somebody reads the file the log stays, and goes with the next change after that."""
    path = tmp_path / "coordinator.db"
    store = Store(path)
    secret = bytes(range(64))
    fill_round(store, "ab" * 16, secret)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM rounds").fetchone()
        store.close_round("ab" * 16, b"record")
        assert remains(tmp_path, [secret]) > 0
    with store.transaction():
        store.end_campaign("c", 2, "")
    assert remains(tmp_path, [secret]) == 0
    assert store.record("ab" * 16) == b"record"
    store.close()


def test_a_killed_coordinators_log_is_emptied_at_the_next_start(tmp_path: Path) -> None:
    """What was in the log when the process was killed is gone once the file is open again."""
    path = tmp_path / "coordinator.db"
    store = Store(path)
    secret = bytes(range(64))
    fill_round(store, "ab" * 16, secret)
    for file in tmp_path.glob("coordinator.db*"):
        shutil.copy(file, tmp_path / file.name.replace("coordinator", "killed"))
    store.close()
    killed = tmp_path / "killed.db"
    assert killed.with_name("killed.db-wal").stat().st_size > 0
    again = Store(killed)
    assert [event.payload for event in again.events("ab" * 16)] == [secret]
    assert killed.with_name("killed.db-wal").stat().st_size == 0
    again.close()


def fill_round(store: Store, round_id: str, payload: bytes) -> None:
    """Store a campaign with an open round that took one message."""
    store.connection.execute(
        "INSERT INTO campaigns (campaign_id, started_at, plan, state, model_digest)"
        " VALUES ('c', 0, x'', 1, x'')"
    )
    row = RoundRow(
        round_id=round_id, campaign_id="c", number=1, started_at=0.0, invited=(), invite=b""
    )
    store.add_round(row)
    store.append_event(round_id, EventRow(at=0.0, device_id="d", kind="message", payload=payload))


def test_what_was_synced_outlasts_a_loss_of_power(tmp_path: Path) -> None:
    """After `sync` the log holds a round's events for whoever reads the disk alone."""
    store = Store(tmp_path / "coordinator.db")
    fill_round(store, "ab" * 16, b"answer")
    store.sync()
    lost = tmp_path / "lost"
    lost.mkdir()
    for name in ("coordinator.db", "coordinator.db-wal"):
        (lost / name).write_bytes((tmp_path / name).read_bytes())
    assert [event.payload for event in Store(lost / "coordinator.db").events("ab" * 16)] == [
        b"answer"
    ]
    store.close()


def test_disk_that_fails_to_sync(tmp_path: Path) -> None:
    """It is told, and tried again the next time."""
    store = Store(tmp_path / "coordinator.db")
    fill_round(store, "ab" * 16, b"answer")
    log = tmp_path / "coordinator.db-wal"
    log.rename(tmp_path / "away")
    with pytest.raises(StorageError, match="free space on its disk"):
        store.sync()
    (tmp_path / "away").rename(log)
    store.sync()
    store.close()
