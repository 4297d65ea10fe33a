"""The search, on a real Ray."""

import signal
from pathlib import Path

import pytest

from minga.training import TaskReference
from minga.training.config import SearchConfig
from minga.training.errors import TrainingError

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture
def run_search(ray_cluster, tmp_path):
    """Searches a Task of the tests, one trial at a time so that the result repeats."""
    from minga.training.search import search

    def run(name="Blobs", *, folder="search", on_progress=lambda progress: None, **settings):
        reference = TaskReference(root=TASKS, name=f"blobs.py:{name}")
        task = reference.load()
        settings = {"num_trials": 4, "max_epochs": 4, "max_concurrent": 1} | settings
        return search(
            reference,
            task,
            task.data("1"),
            config=SearchConfig(**settings),
            seed=7,
            folder=tmp_path / folder,
            on_progress=on_progress,
        )

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


def test_interrupted_search_goes_on(run_search):
    """Ctrl-C keeps what is done; the same search ends with what an undisturbed one finds."""

    def interrupt(progress):
        if progress.done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"[23] of 4 trials are kept in"):
        run_search(on_progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    rest = run_search()
    assert rest.resumed
    whole = run_search(folder="other")
    assert [trial.params for trial in rest.trials] == [trial.params for trial in whole.trials]
    assert rest.metrics == whole.metrics
    assert rest.params == whole.params


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
