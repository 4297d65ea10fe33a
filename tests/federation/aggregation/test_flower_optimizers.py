"""Server optimisers against those of the installed Flower, given the same devices' models."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdagrad as FlowerFedAdagrad
from flwr.server.strategy import FedAdam as FlowerFedAdam
from flwr.server.strategy import FedAvg as FlowerFedAvg
from flwr.server.strategy import FedAvgM as FlowerFedAvgM
from flwr.server.strategy import FedYogi as FlowerFedYogi

from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    initial_state,
    step,
)

NUM_ROUNDS = 6
NUM_VALUES = 200
WEIGHTS = (10, 30, 60)
BETAS = {"beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}

START = np.random.default_rng(1).normal(size=NUM_VALUES).astype(np.float32)
UPDATES = np.random.default_rng(2).normal(size=(NUM_ROUNDS, len(WEIGHTS), NUM_VALUES)) * 0.1


def bias_corrected(number: int) -> ServerOptimizer:
    """Give our FedAdam at the rate of Flower's round, which is that of Kingma and Ba's t + 1."""
    t = number + 1
    rate = 0.1 * np.sqrt(1 - BETAS["beta_2"] ** t) / (1 - BETAS["beta_1"] ** t)
    return FedAdam(learning_rate=float(rate), **BETAS)


def flower_path(strategy: FlowerFedAvg) -> list[np.ndarray]:
    """Run Flower's strategy over all rounds; gives the model after each."""
    path, model = [], START
    for number, updates in enumerate(UPDATES, start=1):
        results = [
            (
                None,
                FitRes(
                    status=Status(code=Code.OK, message=""),
                    parameters=ndarrays_to_parameters([model + update.astype(np.float32)]),
                    num_examples=weight,
                    metrics={},
                ),
            )
            for weight, update in zip(WEIGHTS, updates, strict=True)
        ]
        parameters, _ = strategy.aggregate_fit(number, results, [])
        (model,) = parameters_to_ndarrays(parameters)
        path.append(model)
    return path


def our_path(optimizer_of: Callable[[int], ServerOptimizer]) -> list[np.ndarray]:
    """Run ours over the same rounds, from a variance of zero as Flower does."""
    path, model = [], START
    state = initial_state(optimizer_of(1), NUM_VALUES)
    if "variance" in state:
        state["variance"][:] = 0.0
    for number, updates in enumerate(UPDATES, start=1):
        mean = np.average(updates, axis=0, weights=WEIGHTS).astype(np.float32)
        state, model = step(optimizer_of(number), state, model, mean)
        path.append(model)
    return path


def adaptive(kind: type, **settings: float) -> FlowerFedAvg:
    """Make one of Flower's adaptive strategies."""
    return kind(initial_parameters=ndarrays_to_parameters([START]), eta=0.1, **settings)


@pytest.mark.parametrize(
    ("flower", "optimizer_of"),
    [
        (FlowerFedAvg(), lambda _: FedAvg(learning_rate=1.0)),
        (
            FlowerFedAvgM(
                initial_parameters=ndarrays_to_parameters([START]),
                server_learning_rate=0.5,
                server_momentum=0.9,
            ),
            lambda _: FedAvgM(learning_rate=0.5, momentum=0.9),
        ),
        (
            adaptive(FlowerFedAdagrad, tau=1e-3),
            lambda _: FedAdagrad(learning_rate=0.1, beta_1=0.0, tau=1e-3),
        ),
        (adaptive(FlowerFedAdam, **BETAS), bias_corrected),
        (adaptive(FlowerFedYogi, **BETAS), lambda _: FedYogi(learning_rate=0.1, **BETAS)),
    ],
    ids=["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"],
)
def test_same_path_as_flower(
    flower: FlowerFedAvg, optimizer_of: Callable[[int], ServerOptimizer]
) -> None:
    """Over six rounds of three devices the models agree to the rounding of float32."""
    for theirs, ours in zip(flower_path(flower), our_path(optimizer_of), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
