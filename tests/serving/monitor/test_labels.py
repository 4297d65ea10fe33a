"""Labels that come later: joined by request id, real performance, concept drift."""

import numpy as np
import pytest

from minga.inference.errors import MonitorError
from minga.inference.monitor.alarms import AlarmLog
from minga.inference.monitor.keeper import Keeper, Windows
from minga.inference.monitor.labels import Label, LabelDesk, read_labels
from minga.inference.monitor.sketch import Sketch
from minga.inference.monitor.store import Prediction, Store
from minga.inference.monitor.traffic import Traffic
from minga.serving.concept_drift import find_change
from tests.serving.watched import logits, reference, rows, truths

NUM_ROWS = 3000


@pytest.fixture
def table():
    return rows(NUM_ROWS, 20)


@pytest.fixture
def store(tmp_path, table):
    """The store of a monitor that saw a request with an id for each row."""
    sketch = Sketch(reference())
    sketch.add(table, logits(table))
    predictions = [
        Prediction(request=f"r{place}", place=0, score=float(score), answer=float(score))
        for place, score in enumerate(logits(table))
    ]
    traffic = Traffic(
        model="yes-or-no", version="1", began=0.0, sketch=sketch, predictions=predictions
    )
    with Keeper(tmp_path) as keeper:
        keeper.take([traffic])
    store = Store(tmp_path)
    yield store
    store.close()


def labels_of(values, first=0):
    """Label the requests in their order."""
    return [
        Label(request=f"r{first + place}", place=0, value=float(value))
        for place, value in enumerate(values)
    ]


def desk_of(store, **more):
    """Take labels in windows of 500."""
    return LabelDesk(store, "yes-or-no", Windows(rows=500), find_change=find_change, **more)


def test_labels_give_real_performance_and_no_alarm(store, table, tmp_path):
    """Right labels tell the accuracy of the test split again, and each counts once."""
    labels = labels_of(truths(table, 21))
    report = desk_of(store).take(labels)
    assert (report.joined, report.unknown, report.windows) == (NUM_ROWS, 0, 6)
    accuracy = next(one for one in report.performance if one.metric == "accuracy")
    assert accuracy.value == pytest.approx(accuracy.reference, abs=0.05)
    assert report.alarms == []
    again = desk_of(store).take(labels[:10])
    assert (again.joined, again.unknown) == (0, 10)
    assert AlarmLog(tmp_path).read() == ()


def test_wrong_answers_are_concept_drift_and_lost_performance(store, table, tmp_path):
    """When what is right turns over, no input has moved, and yet two kinds of alarm are raised."""
    right = truths(table, 22)
    turned = np.concatenate([right[:1500], 1 - right[1500:]])
    report = desk_of(store).take(labels_of(turned))
    kinds = {alarm.kind.value for alarm in report.alarms if alarm.is_raised}
    assert kinds == {"performance", "concept-drift"}
    assert {alarm.kind.value for alarm in AlarmLog(tmp_path).standing()} == kinds
    drift = next(alarm for alarm in report.alarms if alarm.kind == "concept-drift")
    assert drift.limit < 0.35 < drift.value


def test_labels_may_come_in_pieces(store, table):
    """Several commands fill one window, whatever their order."""
    right = truths(table, 23)
    first = desk_of(store).take(labels_of(right[300:499], first=300))
    second = desk_of(store).take(labels_of(right[:300]))
    third = desk_of(store).take(labels_of(right[499:501], first=499))
    assert [first.windows, second.windows, third.windows] == [0, 0, 1]


def test_impossible_labels_are_refused_whole(store):
    """A label that is no answer of the model leaves all of its chunk to be sent again."""
    labels = [*labels_of([1, 0]), Label(request="r2", place=0, value=0.5)]
    with pytest.raises(MonitorError, match=r"a label is 1 or 0, not 0\.5"):
        desk_of(store).take(labels)
    assert desk_of(store).take(labels[:2]).joined == 2
    with pytest.raises(MonitorError, match="never watched here, only: yes-or-no"):
        LabelDesk(store, "another")


def test_files_of_labels_are_read_with_their_faults_told(tmp_path):
    """CSV with id, label and perhaps row; a fault is told with its line."""
    file = tmp_path / "labels.csv"
    file.write_text("id,row,label\na,0,1\na,1,0\nb,,1\n")
    assert list(read_labels(file)) == [
        Label(request="a", place=0, value=1.0),
        Label(request="a", place=1, value=0.0),
        Label(request="b", place=0, value=1.0),
    ]
    for content, fault in (
        ("id,value\n", "no column label"),
        ("id,label\na,yes\n", "line 2"),
        ("id,row,label\na,-1,1\n", "line 2"),
        ("id,label\na,nan\n", "line 2"),
        ("id,label\n,1\n", "line 2"),
    ):
        file.write_text(content)
        with pytest.raises(MonitorError, match=fault):
            list(read_labels(file))
    with pytest.raises(MonitorError, match="cannot be read"):
        list(read_labels(tmp_path / "nowhere.csv"))


def test_changes_are_found_where_they_are():
    """ADWIN finds no change in a steady stream, and one near its place in a changed stream."""
    generator = np.random.default_rng(24)
    steady = (generator.random(3000) < 0.2).astype(float)
    assert find_change(steady) is None
    changed = (generator.random(1000) < 0.6).astype(float)
    place = find_change([*steady, *changed])
    assert place is not None
    assert 2700 < place < 3200
