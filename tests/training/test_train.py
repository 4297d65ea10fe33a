"""Distributed training, on a real Ray."""

import os
import signal
import subprocess
import sys
import time
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

    def run(name, *, params=None, start=None, on_progress=lambda progress: None, **settings):
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
            start=start,
            on_progress=on_progress,
        )

    return run


def test_lost_worker_changes_nothing(run_train, tmp_path):
    """A worker killed in the third epoch is replaced; the weights are those of a quiet run.

    Both workers end together when nothing is gained any more, though only one has validated.
    """
    marker = tmp_path / "killed"
    marker.touch()
    params = {"marker": str(marker)}
    # All epochs after the first gain less, so training ends with the sixth.
    settings = {"epochs": 40, "patience": 5, "min_gain": 0.5}
    seen = []
    quiet = run_train("LosesWorker", params=params, on_progress=seen.append, **settings)
    marker.unlink()
    disturbed = run_train("LosesWorker", params=params, **settings)
    assert marker.exists()
    assert to_bytes(quiet.parameters) == to_bytes(disturbed.parameters)
    assert quiet.history == disturbed.history
    assert [record["epoch"] for record in quiet.history] == [1, 2, 3, 4, 5, 6]
    assert (seen[-1].done, seen[-1].total) == (6, 40)
    assert not (tmp_path / "train").exists()


DRIVER = """
import sys
import time
from pathlib import Path
from minga.cluster.stack import local_ray
from minga.training import TaskReference
from minga.training.config import TrainConfig

root, folder, marker = sys.argv[1:]
with local_ray(meanwhile=lambda: print(0, flush=True)):
    from minga.training.train import train

    reference = TaskReference(root=Path(root), name="blobs.py:Notes")
    task = reference.load()
    train(reference, task, task.data("1"), {**task.defaults, "marker": marker},
          config=TrainConfig(num_workers=1, epochs=12), seed=7, folder=Path(folder),
          on_epoch=lambda record: print(record["epoch"], flush=True))
"""


def test_training_goes_on_after_ctrl_c_and_a_killed_driver(run_train, blobs, splits, tmp_path):
    """What is left gives the very weights of the loop called by hand; few epochs are repeated."""
    import ray

    marker, folder = tmp_path / "measured", tmp_path / "train"
    params = {"marker": str(marker)}

    def interrupt(progress):
        if progress.done >= 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="checkpoints are kept in"):
        run_train("Notes", params=params, num_workers=1, epochs=12, on_progress=interrupt)
    environment = os.environ | {"MINGA_RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    words = [sys.executable, "-c", DRIVER, str(TASKS), str(folder), str(marker)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        told = []
        for line in driver.stdout:
            told.append(float(line))
            if told[-1] >= 6:
                driver.kill()
    assert told[0] == 0  # what is done while Ray starts is done before the work
    # The killed driver's training held a processor, and nobody looks after that but Ray itself.
    deadline = time.monotonic() + 60
    while ray.available_resources()["CPU"] < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "a processor is not given back"
        time.sleep(0.1)
    killed_after = len(marker.read_text().splitlines())
    trained = run_train("Notes", params=params, num_workers=1, epochs=12)
    assert len(marker.read_text().splitlines()) < killed_after + 12
    network = build_network(blobs, blobs.defaults, splits.train, seed=7)
    weights = []

    def keep(record):
        weights.append(parameters_of(network))
        return False

    learner = Learner(blobs, network, blobs.defaults)
    fit(learner, splits.train, epochs=12, seed=7, validation=splits.validation, on_epoch=keep)
    assert list(trained.history) == learner.history
    best = [r["epoch"] for r in learner.history if r["accuracy"] == trained.metrics["accuracy"]]
    assert trained.metrics["accuracy"] == max(r["accuracy"] for r in learner.history)
    assert any(
        all(np.array_equal(trained.parameters[n], weights[int(epoch) - 1][n]) for n in weights[0])
        for epoch in best
    )


def test_training_goes_on_from_given_weights(run_train, blobs, splits):
    """With a rate of nothing the weights that come in come out; not those that a seed draws."""
    before = parameters_of(build_network(blobs, blobs.defaults, splits.train, seed=99))
    trained = run_train("Blobs", params={"lr": 0.0}, start=before, num_workers=1, epochs=1)
    assert to_bytes(trained.parameters) == to_bytes(before)


def test_bug_in_the_task_is_one_line(run_train):
    """What fails in a worker comes back as one line with the cause.

    On one machine no process was started that only a cluster needs.
    """
    from ray._private.state import actors

    before = actors().keys()
    with pytest.raises(TrainingError) as caught:
        run_train("BreaksInStep", num_workers=1, max_failures=0)
    assert str(caught.value) == "training failed: ValueError: a bug of the researcher"
    started = [actor["ActorClassName"] for key, actor in actors().items() if key not in before]
    assert sorted(started) == ["RayTrainWorker", "SynchronizationActor", "TrainController"]


def test_more_workers_than_cpus_are_refused(run_train):
    """What would wait for ever is refused at once."""
    with pytest.raises(TrainingError, match="num_workers = 64 but Ray has 4 CPUs"):
        run_train("Blobs", num_workers=64)
