"""The search, on a real Ray."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minga.training import TaskReference, choice
from minga.training.config import SearchConfig
from minga.training.errors import TrainingError
from minga.training.search.ledger import Ledger

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture
def run_search(ray_cluster, tmp_path):
    """Searches a Task of the tests, one trial at a time so that the result repeats."""
    from minga.training.search.tuning import search

    def run(
        name="Blobs",
        *,
        folder="search",
        marker="",
        on_progress=lambda progress: None,
        points=(),
        **settings,
    ):
        reference = TaskReference(root=TASKS, name=f"blobs.py:{name}")
        task = reference.load()
        if marker:  # only what is searched reaches the trials' processes
            task = task.with_defaults({"marker": marker})
            vars(task)["search_space"] = {**task.search_space, "marker": choice([marker])}
        settings = {"num_trials": 4, "max_epochs": 4, "max_concurrent": 1} | settings
        return search(
            reference,
            task,
            task.data("1"),
            config=SearchConfig(**settings),
            seed=7,
            folder=tmp_path / folder,
            points=points,
            on_progress=on_progress,
        )

    run.folder = tmp_path
    return run


def test_search_finds_the_best_of_its_trials(run_search):
    """The first trial is the defaults, the best has the best epoch; progress counts trials."""
    seen = []
    found = run_search(on_progress=seen.append)
    assert [trial.number for trial in found.trials] == [1, 2, 3, 4]
    assert found.trials[0].params == {"lr": 0.01, "hidden": 8, "batch_size": 32}
    assert found.metrics["accuracy"] == max(trial.metrics["accuracy"] for trial in found.trials)
    assert all(len(trial.history) == trial.epochs <= 4 for trial in found.trials)
    assert found.params["batch_size"] == 32
    assert (seen[-1].done, seen[-1].total) == (4, 4)
    assert not found.resumed


DRIVER = """
import sys
from pathlib import Path
from minga.cluster.stack import local_ray
from minga.training import TaskReference
from minga.training.config import SearchConfig

with local_ray():
    from minga.training.search.tuning import search

    reference = TaskReference(root=Path(sys.argv[1]), name="blobs.py:Blobs")
    task = reference.load()
    search(reference, task, task.data("1"), folder=Path(sys.argv[2]), seed=7,
           config=SearchConfig(num_trials=6, max_epochs=4, max_concurrent=2),
           on_progress=lambda progress: print(progress.done, flush=True))
"""


def test_search_goes_on_after_ctrl_c_and_a_killed_driver(run_search, tmp_path):
    """Nothing that has ended is done again; the end is that of one undisturbed trial at a time."""
    import ray

    def interrupt(progress):
        if progress.done == 1:
            signal.raise_signal(signal.SIGINT)

    settings = {"num_trials": 6, "max_concurrent": 2}
    with pytest.raises(KeyboardInterrupt, match=r"[12] of 6 trials are kept in"):
        run_search(on_progress=interrupt, **settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    environment = os.environ | {"MINGA_RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    words = [sys.executable, "-c", DRIVER, str(TASKS), str(tmp_path / "search")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        for line in driver.stdout:
            if int(line) >= 3:
                driver.kill()
    ended = [
        tmp_path / "search" / entry.learner
        for entry in Ledger(tmp_path / "search").read()
        if entry.status in ("finished", "stopped")
    ]
    written = [file.stat().st_mtime_ns for file in ended]
    rest = run_search(**settings)
    assert rest.resumed
    assert len(ended) >= 3
    assert [file.stat().st_mtime_ns for file in ended] == written
    whole = run_search(folder="whole", num_trials=6, max_concurrent=1)
    assert rest.trials == whole.trials
    assert rest.params == whole.params


def test_no_more_trials_run_than_may(run_search, tmp_path):
    """Of six trials on four processors two run at a time, and never three."""
    marker = tmp_path / "seen"
    settings = {"num_trials": 6, "max_epochs": 3, "max_concurrent": 2, "scheduler": "none"}
    run_search("Crowd", marker=str(marker), **settings)
    seen = [int(line) for line in marker.read_text().split()]
    assert len(seen) == 18
    assert max(seen) == 2


def test_population_based_training(run_search):
    """The weak go on with weights and rates of the strong; later generations have their past."""
    found = run_search(scheduler="population", perturbation_epochs=2, max_concurrent=2)
    assert [trial.epochs for trial in found.trials] == [4, 4, 4, 4]
    assert {trial.status for trial in found.trials} == {"finished"}
    ledger = Ledger(run_search.folder / "search").read()
    handed = [entry for entry in ledger if entry.source not in (0, entry.number)]
    assert len(handed) == 1
    source = next(e for e in ledger if (e.generation, e.number) == (0, handed[0].source))
    assert handed[0].before == source.history
    assert handed[0].params["hidden"] == source.params["hidden"]
    assert handed[0].params["lr"] != source.params["lr"]


def test_tpe_begins_with_the_points_it_is_given(run_search):
    """After the defaults come earlier searches' points, then what TPE suggests."""
    point = {"lr": 0.02, "hidden": 16}
    found = run_search(searcher="tpe", num_trials=3, max_epochs=1, points=[point])
    assert [trial.params["lr"] for trial in found.trials[:2]] == [0.01, 0.02]
    assert found.trials[2].params["lr"] not in (0.01, 0.02)


def test_diverging_trials_lose(run_search):
    """Trials whose loss is no number are told apart, and the sound one wins."""
    found = run_search("Diverges", num_trials=3)
    assert [trial.status for trial in found.trials] == ["finished", "diverged", "diverged"]
    assert found.params["lr"] == 0.01


def test_search_in_which_every_trial_fails_is_an_error(run_search):
    """A bug in the Task is shown, with how to look at it alone."""
    with pytest.raises(TrainingError, match=r"none of 2 trials.*a bug of the researcher.*minga"):
        run_search("BreaksInStep", num_trials=2)


def test_search_without_a_space_is_the_defaults(run_search):
    """A Task that searches nothing gets its defaults, without a trial."""
    found = run_search("SearchesNothing")
    assert found.trials == ()
    assert found.params == {"lr": 0.01, "hidden": 8, "batch_size": 32}
