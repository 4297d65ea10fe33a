"""SCAFFOLD and personal tensors in a Task's trainer."""

import numpy as np
import pytest
import torch

from minga.federation.parameters import to_bytes
from minga.training.federated import TaskTrainer
from minga.training.network import build_network, parameters_of

RATE = 0.05
CONFIG = {"epochs": 2, "seed": 3, "lr": RATE, "max_grad_norm": 1e9}


@pytest.fixture
def parameters(blobs, splits):
    """Where a round starts from."""
    return parameters_of(build_network(blobs, blobs.defaults, splits.train, seed=1))


@pytest.fixture
def trainer(blobs):
    """A site that takes plain gradient steps."""
    blobs.optimiser = lambda network, params: torch.optim.SGD(
        network.parameters(), lr=float(params["lr"])
    )
    return TaskTrainer(blobs, blobs.data("20"))


def trained_names(parameters):
    return [name for name in parameters if name.startswith("model.")]


def test_mean_gradient_is_option_two(trainer, parameters):
    """The variate c_i - c + (x - y) / (K lr) of algorithm 1 is the mean gradient along the way."""
    generator = np.random.default_rng(0)
    correction = {
        name: generator.normal(0, 0.1, parameters[name].shape).astype(np.float32)
        for name in trained_names(parameters)
    }
    update = trainer.fit_corrected(parameters, CONFIG, correction)
    num_steps = 2 * 10  # epochs of 300 examples in batches of 32, the last one smaller
    for name in trained_names(parameters):
        option_two = -correction[name] - update.delta[name] / (num_steps * RATE)
        np.testing.assert_allclose(update.gradient[name], option_two, atol=1e-5)


def test_without_a_correction_nothing_changes(trainer, parameters):
    """Zero variates give the bytes of usual training; others give others."""
    zero = {name: np.zeros_like(value) for name, value in parameters.items()}
    usual = trainer.fit(parameters, CONFIG)
    corrected = trainer.fit_corrected(parameters, CONFIG, zero)
    assert usual.gradient is None
    assert to_bytes(corrected.delta) == to_bytes(usual.delta)
    moved = trainer.fit_corrected(
        parameters, CONFIG, {name: value + 0.1 for name, value in zero.items()}
    )
    assert to_bytes(moved.delta) != to_bytes(usual.delta)


def test_what_is_not_trained_has_no_gradient(trainer, parameters):
    """The preparation is neither corrected nor moved."""
    ones = {name: np.ones_like(value) for name, value in parameters.items()}
    update = trainer.fit_corrected(parameters, CONFIG, ones)
    assert set(update.gradient) == set(trained_names(parameters))
    assert not any(np.any(update.delta[n]) for n in parameters if n.startswith("preparation"))


def test_initial_parameters_are_this_sites(trainer, parameters):
    """A new network has the model's seed and this site's own preparation."""
    initial = trainer.initial({"seed": 1})
    assert initial.keys() == parameters.keys()
    for name in parameters:
        same = np.array_equal(initial[name], parameters[name])
        assert same == name.startswith("model.")
