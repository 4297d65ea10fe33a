"""A Task as a device's trainer."""

import shutil

import numpy as np
import pytest

from minga.federation.parameters import to_bytes
from minga.training.errors import ShapeError, TaskError, TrainingError
from minga.training.federated import TaskTrainer, trainer_from_options
from minga.training.network import build_network, load_parameters, parameters_of


@pytest.fixture
def parameters(blobs, splits):
    """Where a round starts from."""
    return parameters_of(build_network(blobs, blobs.defaults, splits.train, seed=1))


@pytest.fixture
def trainer(blobs):
    """A site with other data than the parameters' preparation was fitted on."""
    return TaskTrainer(blobs, blobs.data("20"))


def test_update_is_the_difference(trainer, blobs, splits, parameters):
    """Adding the delta to the start gives the trained network, which is better on this site."""
    update = trainer.fit(parameters, {"epochs": 8, "seed": 3})
    trained = {name: value + update.delta[name] for name, value in parameters.items()}
    load_parameters(build_network(blobs, blobs.defaults, splits.train, seed=1), trained)
    before, after = (trainer.evaluate(p, {}) for p in (parameters, trained))
    assert after["loss"] < before["loss"]
    assert update.num_examples == 300
    assert set(update.metrics) == {"train_loss"}


def test_preparation_does_not_move(trainer, parameters):
    """The preparation is the sender's, not refitted here: its delta is zero."""
    delta = trainer.fit(parameters, {}).delta
    assert not any(np.any(delta[name]) for name in delta if name.startswith("preparation"))
    assert any(np.any(delta[name]) for name in delta if name.startswith("model"))


def test_same_seed_gives_the_same_update(trainer, blobs, parameters):
    """An update repeats byte by byte, also in another trainer; another seed gives another."""
    one = to_bytes(trainer.fit(parameters, {"seed": 3}).delta)
    again = to_bytes(TaskTrainer(blobs, blobs.data("20")).fit(parameters, {"seed": 3}).delta)
    other = to_bytes(trainer.fit(parameters, {"seed": 4}).delta)
    assert one == again
    assert one != other


def test_configuration_overrides_the_defaults(trainer, parameters):
    """Without a learning rate nothing is learned; other widths do not fit the parameters."""
    assert not any(np.any(value) for value in trainer.fit(parameters, {"lr": 0.0}).delta.values())
    with pytest.raises(ShapeError, match="other hyper-parameters"):
        trainer.fit(parameters, {"hidden": 16})


def test_metric_without_a_value_is_left_out(blobs, parameters, monkeypatch):
    """A site whose data gives a metric no value sends none."""
    monkeypatch.setattr(
        blobs, "metrics", lambda outputs, targets: {"accuracy": 0.5, "auc": float("nan")}
    )
    assert set(TaskTrainer(blobs, blobs.data("20")).evaluate(parameters, {})) == {
        "loss",
        "accuracy",
        "num_examples",
    }


def test_columns_are_those_of_this_site(blobs):
    """A query's columns come by name, or numbered, from the data that this site trains on."""
    blobs.columns = ("heat", "load")
    splits = blobs.data("20")
    columns = TaskTrainer(blobs, splits).columns(["load", "x3", "unknown"])
    assert set(columns) == {"load", "x3"}
    np.testing.assert_array_equal(columns["load"], splits.train.inputs[:, 1])


def test_options_lead_to_the_task(tmp_path, reference, parameters):
    """A project folder and a source are all that a device needs to train."""
    shutil.copy(reference.file, tmp_path / "task.py")
    (tmp_path / "minga.toml").write_text('task = "task.py:Blobs"\n[data]\nsource = "1"\n')
    trainer = trainer_from_options({"project": str(tmp_path), "source": "20"})
    assert trainer.fit(parameters, {}).num_examples == 300


@pytest.mark.parametrize(
    ("toml", "source", "words"),
    [
        (None, "20", "copy the project to this device"),
        ("seed = 1", "20", "has no task"),
        ('task = "absent.py:Blobs"', "20", "there is no file"),
        ('task = "blobs.py:Blobs"', "nowhere", "cannot read"),
    ],
)
def test_unusable_project_is_explained(tmp_path, reference, toml, source, words):
    """What a device misses is said in one message."""
    shutil.copy(reference.file, tmp_path)
    if toml is not None:
        (tmp_path / "minga.toml").write_text(toml)
    with pytest.raises(TrainingError, match=words):
        trainer_from_options({"project": str(tmp_path), "source": source})


def test_missing_options_are_named():
    """Both options are asked for by name."""
    with pytest.raises(TaskError, match="lack project and source"):
        trainer_from_options({})
