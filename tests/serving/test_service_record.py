"""The record of what was served where and when, on a real MLflow database."""

import shutil
from datetime import UTC, datetime

import pytest
from mlflow import MlflowClient

from minga.inference.engine import ModelRef
from minga.serving.service_record import SEEN_EVERY_S, ServiceRecord
from minga.training.services import services_of

pytestmark = pytest.mark.slow

START = 1_700_000_000.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now


def ref(version, name="timed"):
    return ModelRef(name=name, version=str(version), path="model.onnx", sha256="ab" * 32)


def at(seconds):
    return datetime.fromtimestamp(START + seconds, UTC)


@pytest.fixture
def uri(migrated_database, tmp_path):
    """A database of this test's own."""
    return f"sqlite:///{shutil.copy(migrated_database, tmp_path)}"


def found(uri, name="timed"):
    return services_of(MlflowClient(tracking_uri=uri, registry_uri=uri), name)


def test_periods_are_recorded(uri):
    """Each version's period at a place has a beginning and an end; one moment has one answer."""
    clock = Clock()
    record = ServiceRecord(uri, "http://127.0.0.1:8000", clock=clock)
    record.note([ref(1)])
    clock.now += 10
    record.note([ref(2), ref(7, "other")])
    clock.now += 10
    record.close()
    assert [(one.version, one.until != "") for one in found(uri)] == [("1", True), ("2", True)]
    answers = [[one.version for one in found(uri) if one.covers(at(s))] for s in (-1, 0, 9, 10, 21)]
    assert answers == [[], ["1"], ["1"], ["2"], []]
    assert [one.version for one in found(uri, "other")] == ["7"]
    assert all(one.place.endswith(":8000") for one in found(uri))


def test_open_period_tells_when_it_was_last_seen(uri):
    """A host that serves on says so each minute; one that died is ended by its successor then."""
    clock = Clock()
    record = ServiceRecord(uri, "http://127.0.0.1:8000", clock=clock)
    record.note([ref(1)])
    for _ in range(3):
        clock.now += SEEN_EVERY_S
        record.note([ref(1)])
    (period,) = found(uri)
    assert not period.until
    assert datetime.fromisoformat(period.seen_at) == at(3 * SEEN_EVERY_S)
    clock.now += 1000  # it died, and somebody starts it again
    ServiceRecord(uri, "http://127.0.0.1:8000", clock=clock).note([ref(1)])
    before, after = found(uri)
    assert datetime.fromisoformat(before.until) == at(3 * SEEN_EVERY_S)
    assert datetime.fromisoformat(after.since) == at(3 * SEEN_EVERY_S + 1000)


def test_places_do_not_end_each_other(uri):
    """Two ports of one machine are two places."""
    for port in (8000, 9000):
        ServiceRecord(uri, f"http://127.0.0.1:{port}").note([ref(1)])
    assert [one.until for one in found(uri)] == ["", ""]


def test_registry_that_is_away_stops_nothing(uri, caplog):
    """What cannot be written is said once, and written as soon as it can be."""
    num_tries = 0

    def connect(tracking_uri):
        nonlocal num_tries
        num_tries += 1
        if num_tries < 3:
            raise OSError("the network is down")
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)

    record = ServiceRecord(uri, "http://127.0.0.1:8000", connect=connect)
    for _ in range(3):
        assert not found(uri)
        record.note([ref(1)])
    assert [one.version for one in found(uri)] == ["1"]
    assert len([one for one in caplog.records if "cannot be written" in one.message]) == 1
