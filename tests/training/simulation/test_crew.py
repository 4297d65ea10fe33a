"""Workers on Ray: the same result, whoever does the work and whoever dies."""

from dataclasses import replace

import numpy as np
import pytest

from minga.federation.parameters import Layout
from minga.training.simulation.config import DirichletTable
from minga.training.simulation.crew import RayCrew, Worker
from minga.training.simulation.lesson import Lesson
from minga.training.simulation.partition import populate
from minga.training.simulation.simulate import simulate
from tests.training.simulation.conftest import reference_to

pytestmark = pytest.mark.slow


@pytest.fixture
def crew(ray_cluster, simulation):
    """Two workers, one in this process for comparison, and a lesson."""
    played = simulation(scaffold=True)
    population = populate(played.task, played.splits, played.config.partition, seed=3)
    config = {**played.task.defaults, "seed": 3, "epochs": 2}
    alone = Worker(played.task, population, config)
    size = alone.num_values
    rng = np.random.default_rng(1)
    lesson = Lesson(
        start=rng.normal(size=size).astype(np.float32),
        config=config,
        corrections=rng.normal(scale=0.01, size=(8, size)).astype(np.float32),
    )
    with RayCrew(reference_to("Dense"), population, config, num_workers=2) as workers:
        yield workers, alone, lesson


def test_workers_share_devices(crew):
    """Rows come back in the devices' order, and are those of one process; a killed worker too."""
    import ray

    workers, alone, lesson = crew
    devices = [5, 0, 7, 2, 3, 11, 1, 4]
    right = alone.fit(devices, lesson)
    for is_killed in (False, True):
        if is_killed:
            ray.kill(workers._workers[0], no_restart=False)
        learnt = workers.fit(devices, lesson)
        np.testing.assert_allclose(learnt.deltas, right.deltas, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(learnt.gradients, right.gradients, rtol=1e-4, atol=2e-6)
    lesson = replace(lesson, corrections=None)
    assert workers.evaluate(devices, lesson) == alone.evaluate(devices, lesson)


@pytest.mark.parametrize("workers", [2, 0])
def test_campaign_on_ray(ray_cluster, simulation, monkeypatch, workers):
    """A campaign over two workers comes to the model of one process, up to rounding."""
    monkeypatch.setattr("minga.training.simulation.effort.OPERATIONS_PER_S", 1.0)
    played = simulation(num_rounds=3)
    here = simulate(played)
    config = played.config.model_copy(update={"workers": workers})
    there = simulate(replace(played, config=config), reference=reference_to("Dense"))
    assert (here.num_workers, there.num_workers >= 2) == (1, True)
    values = [Layout.of(one.parameters).flatten(one.parameters) for one in (here, there)]
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)
    assert [r["devices"] for r in here.history] == [r["devices"] for r in there.history]


def test_thousands_of_devices_on_ray(ray_cluster, simulation):
    """Of 6,000 devices 1,000 train in each round; two workers come to the model of one process."""
    table = DirichletTable(devices=6000, alpha=0.5, examples=16)
    played = simulation(partition=table, num_rounds=2, cohort=1000)
    here = simulate(played)
    config = played.config.model_copy(update={"workers": 2})
    there = simulate(replace(played, config=config), reference=reference_to("Dense"))
    assert (there.num_devices, there.num_workers, there.one_by_one) == (6000, 2, "")
    cohorts = [set(record.survivors) for record in there.campaign.rounds]
    assert [len(cohort) for cohort in cohorts] == [1000, 1000]
    assert len(cohorts[0] & cohorts[1]) < 300  # 167 on average: each is drawn from the whole fleet
    assert [record["examples"] for record in there.history] == [16_000, 16_000]
    values = [Layout.of(one.parameters).flatten(one.parameters) for one in (here, there)]
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)
