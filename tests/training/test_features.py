"""Which columns are proposed, and models that may go by some columns only."""

# ruff: noqa: RUF012 - Tasks as researchers write them

import numpy as np
import pytest
from torch import nn

from minga.training import Maximize, Split, Splits, Task
from minga.training.config import TrainConfig
from minga.training.errors import TaskError
from minga.training.export import run_onnx
from minga.training.models import exported
from minga.training.network import build_network, parameters_of
from minga.training.selection.contenders import contenders_of
from minga.training.selection.features import propose_features

NOISE = tuple(f"noise_{number}" for number in range(6))


class Two(Task):
    """Two columns tell the class together, one of them twice; the others are noise."""

    name = "two"
    columns = ("a", "b", "a_again", "kind", *NOISE)
    categories = {"kind": ("x", "y", "z")}
    defaults = {"lr": 0.01}
    objective = Maximize("accuracy")

    def data(self, source):
        generator = np.random.default_rng(0)
        inputs = generator.normal(size=(1500, 10)).astype(np.float32)
        inputs[:, 2] = 2 * inputs[:, 0] + 1
        inputs[:, 3] = generator.integers(3, size=1500)
        targets = (inputs[:, 0] * inputs[:, 1] > 0).astype(np.float32)
        parts = [
            Split(inputs=inputs[start:stop], targets=targets[start:stop])
            for start, stop in ((0, 900), (900, 1200), (1200, 1500))
        ]
        return Splits(train=parts[0], validation=parts[1], test=parts[2])

    def model(self, params):
        return nn.Sequential(nn.Linear(self.width, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}


@pytest.fixture(scope="module")
def two():
    """The Task with its data."""
    task = Two()
    return task, task.data("")


@pytest.fixture(scope="module")
def proposal(two):
    """What is proposed for it."""
    return propose_features(two[0], two[1].train, seed=1)


def test_what_is_needed_is_proposed_and_noise_is_not(proposal):
    """Columns that tell only together are kept, a copy and noise go, and accuracy stays."""
    assert set(proposal.proposed) == {"a", "b"}
    found = {one.name: one for one in proposal.features}
    assert found["a"].num_useful == found["b"].num_useful == 5
    assert found["a"].information_bits < 0.05
    assert found["a_again"].note == "follows from a"
    assert all(found[name].num_useful <= 2 for name in NOISE)
    assert proposal.with_proposed > 0.9
    assert proposal.behind <= proposal.error


def test_what_is_no_table_has_no_columns_to_choose(two):
    """Images are refused in words."""
    images = Split(inputs=np.zeros((50, 1, 4, 4), np.float32), targets=np.zeros(50))
    with pytest.raises(TaskError, match="can be chosen of a table of floats"):
        propose_features(two[0], images, seed=1)


@pytest.mark.parametrize("name", ["own", "linear", "boosting"])
def test_models_take_whole_rows_and_look_at_some_columns(two, name):
    """Whatever stands in the other columns, as text too, the exported model answers the same."""
    task = two[0].with_defaults({"features": "a,b"})
    splits = two[1]
    contender = contenders_of(task, TrainConfig(epochs=1))[name]
    content = exported(task, contender.fit(splits.train, splits.validation, seed=1))
    rows = splits.test.inputs.copy()
    before = run_onnx(content, rows)
    rows[:, 2:] = np.random.default_rng(5).normal(size=rows[:, 2:].shape) * 100
    rows[:, 3] = 0
    assert np.array_equal(run_onnx(content, rows), before)
    rows[:, 1] = 7
    assert not np.array_equal(run_onnx(content, rows), before)


def test_what_is_out_of_sight_is_ordinary(two):
    """A number's mean and a category's most frequent value stand in, and travel as parameters."""
    task, splits = two
    network = build_network(task, {**task.defaults, "features": "a"}, splits.train, seed=1)
    ordinary = parameters_of(network)["preparation.chosen.ordinary"]
    kinds = splits.train.inputs[:, 3]
    assert ordinary[4] == pytest.approx(splits.train.inputs[:, 4].mean(), abs=1e-6)
    assert ordinary[3] == np.bincount(kinds.astype(int)).argmax()
    assert "preparation.table.mean" in parameters_of(network)


def test_unknown_columns_are_refused(two):
    """A feature that is no column is named, with those that there are."""
    task, splits = two
    with pytest.raises(TaskError, match="features are a, c, the Task's columns are a, b"):
        build_network(task, {**task.defaults, "features": "a,c"}, splits.train, seed=1)
