"""Epochs in MLflow and TensorBoard, while they are made and after an interruption."""

import time
from contextlib import suppress

import pytest
from mlflow.exceptions import MlflowException

from minga.training.recording import recording
from minga.training.tracking import Tracker
from tests.events import points_of


@pytest.fixture
def tracker(tracking_uri, tmp_path):
    """Writes to a database of this test's own."""
    return Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "blobs")


def steps_of(tracker, run_id):
    """Give the epochs that a run has."""
    return [metric.step for metric in tracker.client.get_metric_history(run_id, "train_loss")]


def test_epochs_are_written_while_work_goes_on(tracker, tmp_path):
    """An epoch is in MLflow and TensorBoard's file within seconds, before the next one is made."""
    with tracker.run("train") as run_id, recording(tracker, tmp_path / "boards") as recorder:
        recorder.open(run_id, "first")
        recorder.note(run_id, {"epoch": 1, "train_loss": 0.5})
        deadline = time.monotonic() + 20
        while not points_of(tmp_path / "boards" / "first", "train_loss"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert steps_of(tracker, run_id) == [1]
        recorder.note(run_id, {"epoch": 2, "train_loss": 0.4})
    assert steps_of(tracker, run_id) == [1, 2]
    assert points_of(tmp_path / "boards" / "first", "train_loss") == {
        1: 0.5,
        2: pytest.approx(0.4),
    }


def test_interrupted_run_goes_on(tracker, tmp_path):
    """A stopped run is taken up again, and no epoch is written twice; a finished one is not."""
    kept = tmp_path / "train.run"

    def stop(last):
        with (
            tracker.run("train", kept=kept) as run_id,
            recording(tracker, tmp_path / "boards") as recorder,
        ):
            recorder.open(run_id, "train")
            for epoch in range(1, last + 1):
                recorder.note(run_id, {"epoch": epoch, "train_loss": 1 / epoch})
            if last < 4:
                raise KeyboardInterrupt
        return run_id

    with pytest.raises(KeyboardInterrupt):
        stop(2)
    run_id = stop(4)
    assert steps_of(tracker, run_id) == [1, 2, 3, 4]
    assert tracker.client.get_run(run_id).info.status == "FINISHED"
    assert not kept.exists()
    assert stop(5) != run_id


def test_what_is_measured_later_joins_its_epoch(tracker, tmp_path):
    """Of an epoch that is told twice what is new is written, and no value twice."""
    boards = tmp_path / "boards"
    with tracker.run("simulate") as run_id, recording(tracker, boards) as recorder:
        recorder.open(run_id, "rounds")
        recorder.note(run_id, {"epoch": 1, "loss": 0.5})
        recorder.note(run_id, {"epoch": 1, "devices_loss": 0.6})
        recorder.note(run_id, {"epoch": 1, "loss": 0.5, "devices_loss": 0.6})
    for name in ("loss", "devices_loss"):
        assert len(tracker.client.get_metric_history(run_id, name)) == 1
        assert points_of(boards, name).keys() == {1}


def test_every_run_says_what_code_it_is_of(tracking_uri, tmp_path):
    """A tracker's tags are on each run and each nested one; a run that goes on has those of now."""

    def opened(commit):
        return Tracker.open(tracking_uri, str(tmp_path), "tags", tags={"minga.git_commit": commit})

    kept, ids = tmp_path / "train.run", []
    for commit in ("a1", "b2"):
        tracker = opened(commit)
        with suppress(KeyboardInterrupt), tracker.run("train", kept=kept) as run_id:
            ids += [run_id, tracker.start("trial 1", parent=run_id)]
            if commit == "a1":
                raise KeyboardInterrupt
    assert ids[0] == ids[2]
    tags = [tracker.client.get_run(ids[i]).data.tags["minga.git_commit"] for i in (0, 1, 3)]
    assert tags == ["b2", "a1", "b2"]


def test_run_of_another_experiment_is_not_taken_up(tracker, tracking_uri, tmp_path):
    """A file that names a run that is not there, or is another's, starts a run of its own."""
    kept = tmp_path / "train.run"
    other = Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "other")
    for named in (other.start("train"), "nothing"):
        kept.write_text(named)
        with tracker.run("train", kept=kept) as run_id:
            assert run_id != named


def test_what_mlflow_refuses_is_told_at_the_end(tracker, tmp_path):
    """Epochs that cannot be written do not vanish silently."""
    run_id = tracker.start("train")

    def write():
        with recording(tracker, tmp_path / "boards") as recorder:
            recorder.open(run_id, "train")
            tracker.client.delete_run(run_id)
            recorder.note(run_id, {"epoch": 1, "train_loss": 1.0})

    with pytest.raises(MlflowException, match="must be in the 'active' state"):
        write()
