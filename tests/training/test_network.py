"""Networks, their parameters, and the probe before a run."""

import numpy as np
import pytest
import torch
from torch import nn

from minga.training import Split, load_task
from minga.training.errors import DataError, ShapeError, TaskError
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.preparation import Standardize
from minga.training.probe import probe


def test_same_seed_gives_the_same_network(blobs, splits):
    """First weights depend on the seed and nothing else."""
    one, same, other = (
        parameters_of(build_network(blobs, blobs.defaults, splits.train, seed=seed))
        for seed in (3, 3, 4)
    )
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_parameters_survive_the_round_trip(blobs, splits):
    """Parameters put into another network make it the same network, preparation included."""
    source = build_network(blobs, blobs.defaults, splits.train, seed=1)
    target = build_network(blobs, blobs.defaults, blobs.data("50").train, seed=2)
    load_parameters(target, parameters_of(source))
    inputs = torch.from_numpy(splits.test.inputs)
    assert torch.equal(source.eval()(inputs), target.eval()(inputs))


def test_foreign_parameters_are_refused(blobs, splits):
    """Parameters of another architecture are refused with the first tensor that differs."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1)
    wide = build_network(blobs, {**blobs.defaults, "hidden": 16}, splits.train, seed=1)
    with pytest.raises(ShapeError, match=r"model.0.bias is \(16,\), the network's is \(8,\)"):
        load_parameters(network, parameters_of(wide))


def test_counters_stay_at_home():
    """Only float32 tensors are parameters; batch normalisation's counter is none."""
    names = set(parameters_of(nn.BatchNorm1d(3)))
    assert names == {"weight", "bias", "running_mean", "running_var"}


def test_standardised_inputs_have_mean_0_and_deviation_1(splits):
    """The default preparation takes away scale and shift, and survives a constant column."""
    inputs = np.column_stack([splits.train.inputs, np.full(len(splits.train), 5.0)])
    prepared = Standardize.fitted(inputs)(torch.tensor(inputs, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(prepared.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(prepared.std(0), [1, 1, 1, 1, 0], atol=1e-4)


def test_probe_lets_a_sound_task_pass(blobs, splits):
    """One step and the metrics of a sound Task raise nothing."""
    probe(blobs, blobs.defaults, splits)


def test_probe_finds_disagreeing_shapes(reference):
    """A model for other columns than the data's is found before anything is started."""
    task = load_task("blobs.py:WrongShape", reference.root)
    with pytest.raises(ShapeError, match=r"inputs \(4, 4\) float32.*make model, loss and data"):
        probe(task, task.defaults, task.data("1"))


def test_probe_finds_a_loss_that_is_no_number(blobs, splits):
    """Missing targets show as a loss that is no number; missing inputs are filled in."""
    holes = Split(inputs=np.full((8, 4), np.nan), targets=np.full(8, np.nan))
    with pytest.raises(DataError, match="are values missing"):
        probe(blobs, blobs.defaults, type(splits)(train=holes, validation=holes, test=holes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": lambda outputs, targets: outputs}, "must be one number"),
        ({"metrics": lambda outputs, targets: {"f1": 1.0}}, "gave f1 but the objective"),
        ({"metrics": lambda outputs, targets: outputs @ targets[1:]}, "metrics fails on outputs"),
        ({"model": lambda params: None}, "must return a torch.nn.Module"),
        ({"model": lambda params: params["depth"]}, "model failed: KeyError: 'depth'"),
    ],
)
def test_probe_finds_other_mistakes(reference, splits, changes, words):
    """A loss per example, metrics without the objective, and no model are found as well."""
    task = type(reference.load())
    changed = type("Changed", (task,), {name: staticmethod(f) for name, f in changes.items()})()
    with pytest.raises(TaskError, match=words):
        probe(changed, changed.defaults, splits)
