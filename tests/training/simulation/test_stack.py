"""Devices that are trained together: the same as one by one."""

import numpy as np
import pytest

from minga.federation.parameters import Layout
from minga.training.network import build_network, parameters_of
from minga.training.simulation import outer
from minga.training.simulation.config import DirichletTable
from minga.training.simulation.crew import Worker
from minga.training.simulation.device import OneByOne
from minga.training.simulation.lesson import Lesson, Way
from minga.training.simulation.partition import populate
from minga.training.simulation.stack import Stack
from tests.training.simulation.conftest import reference_to

DEVICES = list(range(10))


class Bench:
    """A Task's devices, of unlike sizes down to a few examples, and a lesson for ten of them."""

    def __init__(self, name):
        self.task = reference_to(name).load()
        splits = self.task.data("1")
        table = DirichletTable(devices=12, alpha=0.5, size_spread=1.0)
        self.population = populate(self.task, splits, table, seed=2)
        self.network = build_network(self.task, self.task.defaults, splits.train, seed=2)
        self.parameters = parameters_of(self.network)
        self.layout = Layout.of(self.parameters)

    def lesson(self, config, *, corrected=False, personal=False):
        start = self.layout.flatten(self.parameters)
        rng = np.random.default_rng(4)
        rows = (len(DEVICES), start.size)
        is_own = np.zeros(start.size, bool)
        if personal:
            is_own = np.concatenate(
                [
                    np.full(self.parameters[name].size, name.startswith("model.head."))
                    for name in self.layout.names
                ]
            )
        own = rng.normal(size=(len(DEVICES), int(is_own.sum()))).astype(np.float32)
        noise = rng.normal(scale=0.01, size=rows).astype(np.float32)
        return Lesson(
            start=start,
            config={"seed": 7, **config},
            own=own if personal else None,
            is_own=is_own if personal else None,
            corrections=noise if corrected else None,
        )

    def both(self, lesson):
        one = OneByOne(self.task, self.layout, self.population).fit(DEVICES, lesson)
        return Stack(self.task, self.network, self.population).fit(DEVICES, lesson), one


def assert_same(together, alone):
    """Compare what devices learnt in both ways."""
    assert together.failures == alone.failures == {}
    assert np.abs(alone.deltas).max() > 1e-3
    np.testing.assert_allclose(together.deltas, alone.deltas, rtol=1e-4, atol=2e-6)
    if alone.gradients is not None:
        np.testing.assert_allclose(together.gradients, alone.gradients, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["Dense", "Convolution", "Weighted"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"epochs": 3, "momentum": 0.9},
        {"epochs": 2, "proximal_mu": 0.5},
        {"epochs": 2, "max_grad_norm": 0.05},
        {"epochs": 2, "optimiser": "Adam", "lr": 0.01},
        {"optimiser": "AdamW", "lr": 0.01},
    ],
    ids=str,
)
def test_together_is_as_one_by_one(name, config):
    """Whatever network, optimiser and pull: every device's update is the same up to rounding."""
    bench = Bench(name)
    assert_same(*bench.both(bench.lesson(config)))


@pytest.mark.parametrize("max_share", [0.0, 4.0, 100.0])
def test_missing_values_are_the_mean_with_and_without_weights(monkeypatch, max_share):
    """Plain descent gives the same whether weights are built always, now and then, or never."""
    monkeypatch.setattr(outer, "MAX_SHARE", max_share)
    bench = Bench("Gaps")
    assert_same(*bench.both(bench.lesson({"epochs": 2, "max_grad_norm": 0.5})))


@pytest.mark.parametrize(
    ("config", "way"),
    [
        ({"epochs": 2}, Way.DESCENT),
        ({"max_grad_norm": 0.05}, Way.DESCENT),
        ({"momentum": 0.9}, Way.DENSE),
        ({"proximal_mu": 0.5}, Way.DENSE),
    ],
    ids=str,
)
def test_short_cuts_lead_where_any_network_goes(config, way):
    """Dense layers take a faster way than a network that nothing is known of, to the same end."""
    shorter, longer = Bench("Dense"), Bench("Disguised")
    lesson = shorter.lesson(config)
    found, right = (
        Stack(one.task, one.network, one.population).fit(DEVICES, lesson)
        for one in (shorter, longer)
    )
    assert (found.way, right.way) == (way, Way.FUNCTIONAL)
    assert_same(found, right)


@pytest.mark.parametrize("name", ["Dense", "Convolution"])
def test_control_variates_together(name):
    """SCAFFOLD's corrections and its mean gradients are each device's own."""
    bench = Bench(name)
    assert_same(*bench.both(bench.lesson({"epochs": 2}, corrected=True)))


def test_personal_tensors_together():
    """Devices that start from heads of their own end as they would alone."""
    bench = Bench("Headed")
    assert_same(*bench.both(bench.lesson({"epochs": 2}, personal=True, corrected=True)))


def test_chunks_do_not_matter(monkeypatch):
    """Cut into chunks of two devices the result is the same."""
    bench = Bench("Dense")
    lesson = bench.lesson({"epochs": 2})
    whole, _ = bench.both(lesson)
    monkeypatch.setattr("minga.training.simulation.stack.CHUNK_BYTES", 8 * lesson.start.size)
    cut, _ = bench.both(lesson)
    np.testing.assert_allclose(cut.deltas, whole.deltas, rtol=1e-4, atol=1e-6)


def test_divergence_is_told_of_each_device_alone():
    """A device whose loss becomes no number fails; the others' updates are not touched."""
    bench = Bench("Dense")
    lesson = bench.lesson({"epochs": 1, "max_grad_norm": 1e30}, corrected=True)
    lesson.corrections[3] = np.inf
    together, alone = bench.both(lesson)
    assert set(together.failures) == set(alone.failures) == {3}
    sound = [row for row in range(len(DEVICES)) if row != 3]
    np.testing.assert_allclose(together.deltas[sound], alone.deltas[sound], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Drops", {}),
        ("Normalises", {}),
        ("Dense", {"optimiser": "Adafactor", "lr": 0.01}),
        ("Dense", {"schedule": "cosine"}),
        ("Dense", {"class_weights": "balanced"}),
    ],
)
def test_worker_sees_what_cannot_be_done_together(name, config):
    """What draws numbers, keeps statistics, looks at whole tensors or at time is trained alone."""
    bench = Bench(name)
    lesson = bench.lesson(config)
    worker = Worker(bench.task, bench.population, lesson.config)
    learnt = worker.fit(DEVICES, lesson)
    alone = OneByOne(bench.task, bench.layout, bench.population).fit(DEVICES, lesson)
    assert worker.one_by_one
    assert np.array_equal(learnt.deltas, alone.deltas)
