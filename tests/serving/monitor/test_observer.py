"""Off the request path: requests to a real server are counted, and never wait for it."""

import contextlib
import sqlite3
import threading
import time

import httpx
import numpy as np
import pytest

from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.engine import OnnxModel
from minga.inference.errors import MonitorError
from minga.inference.grpc_client import GrpcClient
from minga.inference.grpc_server import GrpcServer
from minga.inference.monitor import observer as observing
from minga.inference.monitor.alarms import AlarmLog
from minga.inference.monitor.keeper import Keeper, Windows
from minga.inference.monitor.labels import Label, LabelDesk
from minga.inference.monitor.observer import Observer
from minga.inference.monitor.store import Store
from minga.inference.protocol import InferRequest
from minga.inference.repository import ModelRepository
from minga.inference.server import Server
from tests.serving.conftest import running
from tests.serving.watched import logits, rows, truths, watched_model


@pytest.fixture
def model(write_model) -> OnnxModel:
    """The watched model, loaded."""
    return OnnxModel.load(write_model(watched_model(), "yes-or-no"))


class Deaf:
    """A sink that cannot take anything for a while."""

    def __init__(self, keeper: Keeper) -> None:
        self.is_deaf = True
        self._keeper = keeper

    def take(self, traffic):
        if self.is_deaf:
            raise MonitorError("the disk is full")
        return self._keeper.take(traffic)


def test_a_model_carries_its_reference(model):
    """What a loaded model is compared with comes out of its own file."""
    assert [column.name for column in model.reference.columns[:4]] == [
        "first",
        "second",
        "third",
        "kind",
    ]


def test_requests_over_both_wires_become_windows_alarms_and_metrics(
    write_model, tmp_path, free_threads
):
    """Shifted requests over HTTP and gRPC raise an alarm that a reader, and Prometheus, see."""
    repository = ModelRepository()
    repository.apply([write_model(watched_model(), "yes-or-no")])
    keeper = Keeper(tmp_path / "monitor", Windows(rows=200))
    with keeper, Observer(keeper, flush_s=0.02) as observer:
        app = InferenceApp(repository, observer=observer)
        http, grpc = Server(app, port=0), GrpcServer(app.service, port=0)
        with running(http, grpc):
            with InferenceClient(http.url) as client, GrpcClient(grpc.url) as other:
                for number in range(4):
                    for part, caller in enumerate((client, other)):
                        table = rows(100, 10 * number + part, shift=0.8)
                        answers = caller.infer("yes-or-no", {"input": table})["output"]
                        assert np.allclose(answers, logits(table), atol=1e-5)
                    wait_until(lambda n=number: observer.observed.rows == 200 * (n + 1))
            wait_until(lambda: any(one.windows >= 4 for one in observer.summaries))
            text = httpx.get(f"{http.url}/metrics").text
    alarms = AlarmLog(tmp_path / "monitor").read()
    assert ("drift", "first", True) in {(a.kind, a.subject, a.is_raised) for a in alarms}
    version = 'model="yes-or-no",version="1"'
    standing = 'kind="drift",model="yes-or-no",subject="first",version="1"'
    assert f"minga_monitor_windows_total{{{version}}} 4.0" in text
    assert f'minga_monitor_alarms_total{{kind="drift",{version}}} 1.0' in text
    assert f"minga_monitor_standing_alarm{{{standing}}} 1.0" in text
    assert f'minga_monitor_estimated_performance{{metric="accuracy",{version}}}' in text
    assert "minga_monitor_rows_total 800.0" in text


def num_predictions(folder) -> int:
    """Count the answers that wait for their labels."""
    with contextlib.closing(sqlite3.connect(folder / "monitor.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM predictions").fetchone()
    return int(count)


def wait_until(is_done, timeout_s: float = 10) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def free_threads():
    """No monitor's thread outlives the test."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "minga-monitor"]


def test_requests_with_ids_wait_for_their_labels(write_model, tmp_path, serve):
    """A label joins the answer of the row that it names; callers' endless ids are not kept."""
    repository = ModelRepository()
    repository.apply([write_model(watched_model(), "yes-or-no")])
    table = rows(6, 1)
    with Keeper(tmp_path) as keeper, Observer(keeper) as observer:
        app = InferenceApp(repository, observer=observer)
        with serve(app) as url, InferenceClient(url) as client:
            for request_id in ("order 7", "x" * 1000, None):
                client.request("yes-or-no", InferRequest(inputs={"input": table}, id=request_id))
    store = Store(tmp_path)
    assert num_predictions(tmp_path) == 6
    labels = [
        Label(request="order 7", place=place, value=float(value))
        for place, value in enumerate(truths(table, 2))
    ]
    report = LabelDesk(store, "yes-or-no").take([*labels, labels[0]])
    assert (report.joined, report.unknown) == (6, 1)
    store.close()


def test_a_full_queue_drops_and_counts(model, tmp_path):
    """What does not fit into memory is dropped at once, with a count, and the rest is counted."""
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper, max_pending_bytes=100 * 16)
        table = rows(10, 1)
        for _ in range(25):
            observer.observe(model, {"input": table}, {"output": logits(table)}, None)
        assert observer.observed.dropped == 15
        observer.flush()
        assert observer.observed.rows == 100
        observer.observe(model, {"input": table}, {"output": logits(table)}, None)
        assert observer.observed.dropped == 15


def test_too_many_rows_are_thinned_out(model, tmp_path, monkeypatch):
    """Of more rows than are looked at, every so many-th counts; the others are told."""
    monkeypatch.setattr(observing, "MAX_CELLS", 4000)
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper)
        for seed in range(5):
            table = rows(800, seed)
            observer.observe(model, {"input": table}, {"output": logits(table)}, None)
        observer.flush()
    assert (observer.observed.rows, observer.observed.skipped) == (1000, 3000)


def test_a_busy_version_is_thinned_before_the_queue(model, tmp_path, monkeypatch):
    """After a look at too much a part is queued, with an id always; when it is calm again, all."""
    monkeypatch.setattr(observing, "MAX_CELLS", 400)  # 100 rows
    table = rows(1, 1)
    ask = {"input": table}, {"output": logits(table)}
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper)
        observed = observer.observed
        for counted in (100, 200, 300):  # the first from the queue of 500, the others thinned to it
            for _ in range(500):
                observer.observe(model, *ask, None)
            observer.flush()
            assert (observed.rows, observed.skipped) == (counted, 4 * counted)
        for number in range(60):
            observer.observe(model, *ask, f"r{number}")
        observer.flush()
        assert (observed.rows, observed.skipped) == (360, 1200)
        for _ in range(100):  # few enough again
            observer.observe(model, *ask, None)
        observer.flush()
        assert (observed.rows, observed.skipped) == (460, 1200)
        for _ in range(500):
            observer.observe(model, *ask, None)
        observer.flush()
        assert (observed.rows, observed.skipped) == (560, 1600)
        for _ in range(4):
            observer.observe(model, *ask, None)
        observer.flush()  # none of these was the fifth: they are told, and the next are all queued
        assert (observed.rows, observed.skipped) == (560, 1604)
        observer.observe(model, *ask, None)
        observer.flush()
        assert (observed.rows, observed.skipped) == (561, 1604)
    assert num_predictions(tmp_path) == 60


def test_one_request_does_not_fill_the_store(model, tmp_path, monkeypatch):
    """Of a request with an id and any number of rows no more answers are kept than of many."""
    monkeypatch.setattr(observing, "MAX_PREDICTIONS", 50)
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper)
        for number, num_rows in enumerate((40, 1000, 10)):
            table = rows(num_rows, number)
            observer.observe(model, {"input": table}, {"output": logits(table)}, f"r{number}")
        observer.flush()
    assert num_predictions(tmp_path) == 50


def test_a_sink_that_fails_loses_nothing(model, tmp_path, caplog):
    """While the store does not take it, counts add up; then they are all there, told once."""
    table = rows(100, 1)
    with Keeper(tmp_path) as keeper:
        sink = Deaf(keeper)
        observer = Observer(sink)
        for _ in range(3):
            observer.observe(model, {"input": table}, {"output": logits(table)}, None)
            observer.flush()
        sink.is_deaf = False
        observer.flush()
    with Keeper(tmp_path) as again:
        assert again.take([])[0].open_rows == 300
    assert observer.observed.rows == 300
    assert len(caplog.records) == 1


def test_what_cannot_be_counted_stops_nothing(model, tmp_path, caplog):
    """Rows that no longer fit together are a count of failures; later ones are counted."""
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper)
        observer.observe(model, {"input": rows(3, 1)}, {"output": np.zeros((2, 2, 2))}, "a")
        observer.observe(model, {"input": np.zeros((3, 9), np.float32)}, {}, None)
        observer.flush()
        observer.observe(model, {"input": rows(3, 1)}, {"output": logits(rows(3, 1))}, None)
        observer.flush()
    assert (observer.observed.failed, observer.observed.rows) == (2, 3)
    assert len(caplog.records) == 1


def test_models_without_a_reference_are_left_alone(write_model, models, tmp_path):
    """A model that was not trained by Minga is served and not watched."""
    model = OnnxModel.load(write_model(models["scaling"](2)))
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper)
        observer.observe(model, {"input": np.ones((1, 3), np.float32)}, {}, "id")
        observer.flush()
        assert observer.observed.rows == 0
        assert keeper.take([]) == ()


def test_noting_a_request_takes_microseconds(model, tmp_path):
    """On the event loop a request costs a hundredth of what it takes to answer the smallest one."""
    with Keeper(tmp_path) as keeper:
        observer = Observer(keeper)
        inputs, outputs = {"input": rows(1, 1)}, {"output": logits(rows(1, 1))}
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(500):
                observer.observe(model, inputs, outputs, None)
            times.append((time.perf_counter() - start) / 500)
    assert min(times) < 10e-6
