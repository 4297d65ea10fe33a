"""Training a run again: equal bit by bit, and what is said where it cannot be."""

import contextlib
import io
import json
import subprocess

import numpy as np
import pytest

from minga.cli.app import main
from minga.cluster import pipeline
from minga.cluster.errors import ReproductionError
from minga.cluster.project import load
from minga.cluster.reproduction import first_difference, reproduce, require_training
from minga.training.bundle import LINEAGE, Digests
from minga.training.bundle import WEIGHTS as WEIGHTS_FILE
from minga.training.errors import DataError, VerdictError
from minga.training.lineage import Campaign, Lineage

TASK = '''
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Split, Splits, Task

SLOPE = 3.0


class Line(Task):
    """Tell which side of a line points are on."""

    name = "line"
    defaults = {"lr": 0.01, "hidden": 8, "batch_size": 32}
    objective = Maximize("accuracy")

    def data(self, source):
        points = np.loadtxt(source, np.float32, delimiter=",")
        targets = (points[:, 0] * SLOPE > points[:, 1]).astype(np.float32)
        parts = [Split(inputs=points[i::3], targets=targets[i::3]) for i in range(3)]
        return Splits(train=parts[0], validation=parts[1], test=parts[2])

    def model(self, params):
        hidden = int(params["hidden"])
        return nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1), nn.Flatten(0)
        )

    def loss(self, outputs, targets):
        if Path(__file__).with_name("by-chance").exists():
            outputs = outputs + int.from_bytes(os.urandom(2), "big") / 65536
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}
'''

SETTINGS = """
task = "line.py:Line"
seed = 3

[data]
source = "data/points.csv"

[training]
num_workers = 2
epochs = 2

[gates]
max_regression = 1.0
max_missing_loss = 1.0
"""

pytestmark = pytest.mark.slow


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


def train(folder, parent=None):
    """Train with the Task's defaults, or a version further, and register."""
    project = load(folder)
    start = pipeline.parent_of(project, parent) if parent else None
    trained = pipeline.train_model(project, project.loaded_task.defaults, parent=start)
    return pipeline.register_trained(project, trained)


@pytest.fixture(scope="module")
def folder(ray_cluster, with_database, tmp_path_factory):
    """A project in a folder of a Git repository; version 1 was trained by two workers.

    Since then the Task has changed, and the change is committed.
    """
    folder = tmp_path_factory.mktemp("repository") / "line"
    (folder / "data").mkdir(parents=True)
    with_database(folder)
    (folder / "line.py").write_text(TASK)
    (folder / "minga.toml").write_text(SETTINGS)
    (folder / ".gitignore").write_text(".minga/\n__pycache__/\ndata/\nby-chance\n")
    points = np.random.default_rng(0).normal(size=(600, 2))
    np.savetxt(folder / "data" / "points.csv", points, delimiter=",")
    git(folder.parent, "init")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-m", "first")
    train(folder)
    (folder / "line.py").write_text(TASK.replace("SLOPE = 3.0", "SLOPE = -1.0"))
    (folder / "minga.toml").write_text(SETTINGS.replace("epochs = 2", "epochs = 5"))
    git(folder.parent, "commit", "-a", "-m", "another line, and longer")
    return folder


def test_two_workers_give_the_same_bits_again(folder):
    """Two DDP workers of a fresh process give the recorded weights, from the code of then.

    Code and settings of today are others, and stay as they are; no folder is left behind.
    """
    today = (folder / "line.py").read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        main(["reproduce", "1", "--project", str(folder), "--json"])
    assert left.value.code in (0, None)
    found = json.loads(printed.getvalue())
    assert found["is_equal"], found
    assert found["recorded_sha256"] == found["now_sha256"]
    assert found["metrics"]["accuracy"][0] == found["metrics"]["accuracy"][1]
    assert (found["conditions"], found["first_difference"]) == ([], None)
    assert (folder / "line.py").read_text() == today
    worktrees = subprocess.check_output(["git", "-C", folder, "worktree", "list"], text=True)
    assert len(worktrees.splitlines()) == 1
    run = load(folder).tracker().client.get_run(found["new_run_id"])
    assert run.data.tags["minga.reproduces"] == found["run_id"]


@pytest.fixture(scope="module")
def by_one(folder):
    """What one worker made of version 1, from a tree with uncommitted changes."""
    (folder / "minga.toml").write_text(SETTINGS.replace("num_workers = 2", "num_workers = 1"))
    return load(folder).registry().get("line", train(folder, parent=1).version)


def test_one_worker_gives_the_same_bits_again(folder, by_one):
    """One worker gives the recorded weights too, going on from the weights of version 1.

    That the tree was dirty then is said.
    """
    found = reproduce(load(folder), by_one)
    assert found.is_equal, found.first_difference
    files = load(folder).registry().fetch("line", by_one.version)
    assert Lineage.read(files / LINEAGE).parent_version == 1
    assert [one.what for one in found.conditions] == ["Git tree"]
    assert "uncommitted changes" in found.conditions[0].recorded


def test_task_that_draws_by_itself_is_told(folder, by_one):
    """What draws from elsewhere than the seed gives other weights; the first epoch is named."""
    (folder / "by-chance").touch()
    found = reproduce(load(folder), by_one)
    assert not found.is_equal
    assert found.first_difference.what.startswith("epoch 1, ")
    assert found.metrics.keys() >= {"accuracy", "loss"}
    assert found.recorded_sha256 == by_one.digests.weights != found.now_sha256


@pytest.fixture
def version(folder):
    """Version 1."""
    return load(folder).registry().get("line", 1)


def test_missing_and_changed_data_are_said(folder, version):
    """Data that is gone or not what it was stops the attempt before anything is trained."""
    file = folder / "data" / "points.csv"
    content = file.read_text()
    try:
        file.unlink()
        with pytest.raises(DataError, match=r"is missing: .*dvc checkout"):
            reproduce(load(folder), version)
        file.write_text(content.replace("1", "2", 1))
        with pytest.raises(DataError, match="is not what it was"):
            reproduce(load(folder), version)
    finally:
        file.write_text(content)


def test_a_record_that_was_altered_is_not_trained(folder, version):
    """Who writes to the registry chooses neither the code that is run nor the data that is read.

    A source may name secrets of the environment, so a strange one could also send them away.
    """
    project = load(folder)
    (settings,) = (folder / ".minga").rglob(f"{version.run_id}/**/minga.json")
    lineage = project.registry().fetch("line", 1) / LINEAGE
    for file, was, becomes in (
        (settings, "data/points.csv", "http://127.0.0.1:9/${HOME}.csv"),
        (settings, "line.py:Line", "../evil.py:Line"),
        (lineage, '"reference": "line.py:Line"', '"reference": "../evil.py:Line"'),
    ):
        content = file.read_text()
        assert was in content
        try:
            file.write_text(content.replace(was, becomes))
            retag(project.registry(), version)
            with pytest.raises(VerdictError, match=r"altered|other files"):
                reproduce(load(folder), version)
        finally:
            file.write_text(content)
            retag(project.registry(), version)


def retag(registry, version):
    """Make the registry's tags agree with the files, as who can write to it may."""
    digests = Digests.of(registry._folder(version))
    registry._tag(version, "minga.bundle_sha256", digests.bundle)
    registry._tag(version, "minga.weights_sha256", digests.weights)


def test_altered_weights_are_not_judged_anew(folder, version):
    """Else weights of a stranger would be signed as the work of those who made the version."""
    project = load(folder)
    weights = project.registry().fetch("line", 1) / WEIGHTS_FILE
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        retag(project.registry(), version)
        with pytest.raises(VerdictError, match="other files"):
            pipeline.judge_anew(project, 1)
    finally:
        weights.write_bytes(content)
        retag(project.registry(), version)


@pytest.mark.parametrize(
    ("campaign", "step", "complaint"),
    [
        (None, "register", "from version 4; reproduce that one"),
        (Campaign(name="c-7", rounds=2, cohort=5), "register", "c-7: devices kept their data"),
    ],
    ids=["judged anew", "federated"],
)
def test_runs_that_trained_nothing_are_refused(folder, version, campaign, step, complaint):
    """A federated version and one that was only judged anew name what to reproduce instead."""
    lineage = Lineage.read(load(folder).registry().fetch("line", 1) / LINEAGE)
    told = lineage.model_copy(update={"campaign": campaign, "parent_version": 4})
    with pytest.raises(ReproductionError, match=complaint):
        require_training(version, told, {"minga.step": step})


RECORDS = ({"epoch": 1.0, "train_loss": 0.5}, {"epoch": 2.0, "train_loss": 0.25})
WEIGHTS = {"w": np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("now", "after", "what"),
    [
        (({"epoch": 1.0, "train_loss": 0.5}, {"epoch": 2.0, "train_loss": 0.3}), {}, "epoch 2, "),
        (RECORDS[:1], {}, "number of epochs"),
        (RECORDS, {"w": np.array([[0, 0], [1, 1]], np.float32)}, "tensor w, 2 of 4 values, first"),
        (RECORDS, {"w": np.zeros(3, np.float32)}, "tensor w"),
        (RECORDS, {**WEIGHTS, "v": np.zeros(1, np.float32)}, "tensor v"),
        (RECORDS, {"w": -WEIGHTS["w"]}, "tensors"),
    ],
    ids=["loss", "epochs", "values", "shape", "names", "signs of zero"],
)
def test_first_difference_is_named(now, after, what):
    """Epochs are compared before tensors, and tensors before their bits."""
    found = first_difference(RECORDS, now, before=WEIGHTS, after=after or WEIGHTS)
    assert found.what.startswith(what)
