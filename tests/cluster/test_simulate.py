"""`minga simulate`: a project's federation on virtual devices."""

import contextlib
import io
import json
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from minga.cli.app import main
from minga.cluster.learning import finished_search, search
from minga.cluster.project import load
from minga.training.simulation.simulate import Simulation, simulate
from tests.events import points_of

TASK = Path(__file__).parents[1] / "training" / "tasks" / "virtual.py"
TABLES = """
task = "virtual.py:Dense"
seed = 3
[data]
source = "1"
[federation]
num_rounds = 4
cohort = 6
protection = "plain"
[federation.evaluation]
enabled = true
every = 2
[simulation]
workers = 1
[simulation.partition]
name = "dirichlet"
devices = 12
"""


SEARCH = """
[search]
over = "simulation"
num_trials = 4
max_epochs = 4
"""


PRIVATE = """
[federation.privacy]
name = "central"
epsilon = 0.01
delta = 1e-5
noise_multiplier = 0.5
max_norm = 1.0
"""


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    code: int
    out: str
    err: str


def minga(*words):
    """Run a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def plant(with_database, tmp_path_factory):
    """A project's folder."""
    folder = tmp_path_factory.mktemp("plant")
    (folder / "minga.toml").write_text(TABLES)
    shutil.copy(TASK, folder / "virtual.py")
    return with_database(folder)


def test_rounds_are_shown_and_kept_in_mlflow(plant):
    """JSON has a record for each round; the run has them as metrics, with settings and weights."""
    said = minga("simulate", "--project", str(plant), "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert [record["epoch"] for record in report["rounds"]] == [1, 2, 3, 4]
    assert "devices_accuracy" in report["rounds"][1]
    assert report["together"]
    assert report["devices"] == 12
    project = load(plant)
    client = project.tracker().client
    history = client.get_metric_history(report["run_id"], "accuracy")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert [point.value for point in history] == [r["accuracy"] for r in report["rounds"]]
    run = client.get_run(report["run_id"])
    assert run.data.metrics["test_accuracy"] == report["metrics"]["accuracy"]
    assert run.data.params["partition"] == "dirichlet"
    names = {file.path for file in client.list_artifacts(report["run_id"])}
    assert names == {"minga.json", "model.safetensors"}
    for name in ("accuracy", "devices_accuracy"):
        curve = points_of(project.tensorboard_folder / f"simulate-{report['run_id'][:8]}", name)
        assert curve == pytest.approx({r["epoch"]: r[name] for r in report["rounds"] if name in r})


def test_interrupted_simulation_goes_on(plant, monkeypatch):
    """After Ctrl-C the same command goes on, to the same history; --fresh begins anew.

    The run has each round once.
    """
    whole = json.loads(minga("simulate", "--project", str(plant), "--json").out)["rounds"]
    from minga.cluster.simulate import _Log

    note = _Log.note

    def stop(self, record):
        note(self, record)
        if record["epoch"] == 3:
            raise KeyboardInterrupt
        return False

    for words, num_played in (((), 2), (("--fresh",), 4)):
        with monkeypatch.context() as patch:
            patch.setattr(_Log, "note", stop)
            said = minga("simulate", "--project", str(plant))
        assert said.code == 130
        assert "2 rounds are kept; the same command goes on from there" in said.err
        said = minga("simulate", "--project", str(plant), "--json", *words)
        report = json.loads(said.out)
        assert report["rounds"] == whole
        history = load(plant).tracker().client.get_metric_history(report["run_id"], "accuracy")
        assert [point.step for point in history] == [1, 2, 3, 4]
        lines = [line for line in said.err.splitlines() if line.startswith("simulate")]
        assert len([line for line in lines if "updates" in line]) == num_played


@pytest.mark.parametrize(
    ("table", "code", "message"),
    [
        ("devices = 12", 0, "12 virtual devices"),
        ("devices = 999", 13, "240 training examples are too few for 999 devices"),
        ("devices = 4\nalfa = 1", 10, "did you mean alpha?"),
        ("devices = 2", 34, "2 virtual devices are fewer than min_cohort 3"),
    ],
)
def test_mistakes_are_said(plant, table, code, message):
    """What cannot be simulated is one line with a remedy and its own exit code."""
    (plant / "minga.toml").write_text(TABLES.replace("devices = 12", table))
    try:
        said = minga("simulate", "--project", str(plant))
    finally:
        (plant / "minga.toml").write_text(TABLES)
    assert said.code == code, said.err
    assert message in said.out + said.err


@pytest.fixture
def searching(plant):
    """The project with a search over simulations; gives a function that writes its settings."""

    def write(more=""):
        tables = TABLES.replace("virtual.py:Dense", "virtual.py:Searched") + SEARCH + more
        (plant / "minga.toml").write_text(tables)
        return plant

    yield write
    (plant / "minga.toml").write_text(TABLES)


@pytest.mark.slow
def test_search_over_simulations(searching, ray_cluster):
    """Each trial is the campaign that `simulate` plays with its parameters, until it is cut.

    Interrupted, the search goes on.
    """
    folder, heard = searching(), []

    def interrupt(progress):
        heard.append(progress.note)
        if progress.done == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"[12] of 4 trials are kept in"):
        search(load(folder), interrupt)
    said = minga("tune", "--project", str(folder), "--json")
    assert said.code == 0, said.err
    assert any(re.match(r"trial \d: round \d, accuracy", note) for note in heard)
    project = load(folder)
    found = finished_search(project)
    assert found.resumed
    assert found.trials[0].epochs == 4
    assert {trial.status for trial in found.trials} == {"finished", "cut"}
    for trial in found.trials:
        done = simulate(
            Simulation(
                task=project.loaded_task,
                splits=project.splits,
                federation=project.federation,
                config=project.simulation,
                params=trial.params,
                seed=project.seed,
            )
        )
        names = ("epoch", "accuracy", "loss", "devices")
        expected = [tuple(record[name] for name in names) for record in done.history]
        got = [tuple(record[name] for name in names) for record in trial.history]
        assert got == expected[: trial.epochs]
    assert json.loads(said.out)["params"] == found.params


@pytest.mark.parametrize(
    ("table", "code", "message"),
    [
        ('scheduler = "population"', 10, "hands weights from trial to trial"),
        ("[federation.training]\nlr = 1.0", 11, "lr: searched, and set in [federation.training]"),
        (PRIVATE, 34, "privacy counts updates of whole rounds"),
    ],
)
def test_searches_that_cannot_be_are_refused(searching, table, code, message):
    """What no trial could do is said before anything begins."""
    said = minga("tune", "--project", str(searching(table)))
    assert said.code == code, said.err
    assert message in said.err
