"""Distributed training, on a real Ray."""

import signal
from pathlib import Path

import numpy as np
import pytest

from minga.federation.parameters import to_bytes
from minga.training import TaskReference
from minga.training.config import TrainConfig
from minga.training.errors import TrainingError
from minga.training.loop import Learner, fit
from minga.training.network import build_network, parameters_of

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture
def run_train(ray_cluster, tmp_path):
    """Trains a Task of the tests with its defaults."""
    from minga.training.train import train

    def run(name, *, params=None, on_progress=lambda progress: None, **settings):
        reference = TaskReference(root=TASKS, name=f"blobs.py:{name}")
        task = reference.load()
        return train(
            reference,
            task,
            task.data("1"),
            {**task.defaults, **(params or {})},
            config=TrainConfig(**{"epochs": 6} | settings),
            seed=7,
            folder=tmp_path / "train",
            on_progress=on_progress,
        )

    return run


def test_lost_worker_changes_nothing(run_train, tmp_path):
    """A worker killed in the third epoch is replaced; the weights are those of a quiet run."""
    marker = tmp_path / "killed"
    marker.touch()
    params = {"marker": str(marker)}
    seen = []
    quiet = run_train("LosesWorker", params=params, on_progress=seen.append)
    marker.unlink()
    disturbed = run_train("LosesWorker", params=params)
    assert marker.exists()
    assert to_bytes(quiet.parameters) == to_bytes(disturbed.parameters)
    assert quiet.history == disturbed.history
    assert [record["epoch"] for record in quiet.history] == [1, 2, 3, 4, 5, 6]
    assert (seen[-1].done, seen[-1].total) == (6, 6)
    assert not (tmp_path / "train").exists()


def test_interrupted_training_goes_on(run_train, blobs, splits):
    """Ctrl-C keeps the checkpoints; the rest gives the very weights of the loop called by hand."""

    def interrupt(progress):
        if progress.done >= 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="checkpoints are kept in"):
        run_train("Blobs", num_workers=1, epochs=20, on_progress=interrupt)
    trained = run_train("Blobs", num_workers=1, epochs=20)
    network = build_network(blobs, blobs.defaults, splits.train, seed=7)
    weights = []

    def keep(record):
        weights.append(parameters_of(network))
        return False

    learner = Learner(blobs, network, blobs.defaults)
    fit(learner, splits.train, epochs=20, seed=7, validation=splits.validation, on_epoch=keep)
    assert list(trained.history) == learner.history
    best = [r["epoch"] for r in learner.history if r["accuracy"] == trained.metrics["accuracy"]]
    assert trained.metrics["accuracy"] == max(r["accuracy"] for r in learner.history)
    assert any(
        all(np.array_equal(trained.parameters[n], weights[int(epoch) - 1][n]) for n in weights[0])
        for epoch in best
    )


def test_bug_in_the_task_is_one_line(run_train):
    """What fails in a worker comes back as one line with the cause."""
    with pytest.raises(TrainingError) as caught:
        run_train("BreaksInStep", num_workers=1, max_failures=0)
    assert str(caught.value) == "training failed: ValueError: a bug of the researcher"


def test_more_workers_than_cpus_are_refused(run_train):
    """What would wait for ever is refused at once."""
    with pytest.raises(TrainingError, match="num_workers = 64 but Ray has 4 CPUs"):
        run_train("Blobs", num_workers=64)
