"""What the tests of simulations share."""

from pathlib import Path

import pytest

from minga.federation.config import FederationConfig
from minga.training import TaskReference
from minga.training.simulation.config import DirichletTable, SimulationConfig
from minga.training.simulation.simulate import Simulation

TASKS = Path(__file__).parents[1] / "tasks"


def reference_to(name):
    """Say where one of the Tasks for simulations is."""
    return TaskReference(root=TASKS, name=f"virtual.py:{name}")


@pytest.fixture
def simulation():
    """Makes simulations: twelve devices of unlike sizes and mixes, six of them in a round."""

    def make(task="Dense", *, partition=None, params=None, seed=3, devices=(), **federation):
        loaded = reference_to(task).load()
        values = {"num_rounds": 3, "cohort": 6, "protection": "plain"} | federation
        table = partition or DirichletTable(devices=12, alpha=0.5, size_spread=0.6)
        return Simulation(
            task=loaded,
            splits=loaded.data("1"),
            federation=FederationConfig.model_validate(values),
            config=SimulationConfig(partition=table, workers=1, **dict(devices)),
            params=params or {},
            seed=seed,
        )

    return make
