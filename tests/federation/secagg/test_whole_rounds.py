"""Rounds from keys to sum, with devices that vanish after any step."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.secagg.coordinator import Unmasked
from minga.federation.secagg.device import Step
from minga.federation.secagg.errors import QuorumError

from .simulator import Simulation, make_plan, names

STEPS = [step for step in Step if step is not Step.NONE]


def assert_exact(result: Unmasked, simulation: Simulation) -> None:
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())
    assert result.total_weight == simulation.true_weight()
    assert result.liars == ()


def test_everyone_stays():
    """A round without losses gives exactly the weighted mean of all."""
    simulation = Simulation()
    assert_exact(simulation.run(), simulation)
    assert simulation.survivors == names(8)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("lost", [1, 2])
def test_devices_vanish_before_a_step(step: Step, lost: int):
    """Whichever step devices miss, the sum is exactly that of those who uploaded."""
    simulation = Simulation(lost_before=dict.fromkeys(names(8)[1 : 1 + lost], step))
    assert_exact(simulation.run(), simulation)
    missed_upload = step <= Step.MASK
    assert len(simulation.survivors) == 8 - lost * missed_upload


@pytest.mark.parametrize("steps", list(combinations(STEPS, 2)))
def test_devices_vanish_before_different_steps(steps: tuple[Step, Step]):
    """Losses at two different steps of one round add up to no harm."""
    simulation = Simulation(lost_before=dict(zip(names(8)[2:4], steps, strict=True)))
    assert_exact(simulation.run(), simulation)


def test_a_device_vanishes_before_every_step():
    """A round of 16 loses one device before each step and is still exact."""
    lost = dict(zip(names(16)[3:], STEPS, strict=False))
    simulation = Simulation(make_plan(16), lost_before=lost)
    assert_exact(simulation.run(), simulation)
    assert len(simulation.survivors) == 13


@settings(max_examples=25)
@given(
    num_devices=st.integers(5, 10),
    fates=st.lists(st.sampled_from([*STEPS, None]), min_size=10, max_size=10),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_losses(num_devices: int, fates: list[Step | None], seed: int):
    """Whoever is lost whenever: the sum is exact, or the round stops for too few devices."""
    lost = {n: f for n, f in zip(names(num_devices), fates, strict=False) if f is not None}
    simulation = Simulation(make_plan(num_devices), lost_before=lost, seed=seed)
    try:
        result = simulation.run()
    except QuorumError:
        return
    assert_exact(result, simulation)


@pytest.mark.parametrize("num_neighbours", [6, 12, 20])
def test_forty_devices_in_a_sparse_graph(num_neighbours: int):
    """Forty devices that know a few neighbours each are summed exactly in spite of losses."""
    lost = dict(zip(names(40)[::8], STEPS, strict=True))
    simulation = Simulation(make_plan(40, num_neighbours=num_neighbours), lost_before=lost)
    assert_exact(simulation.run(), simulation)
    assert len(simulation.survivors) == 37


def test_too_few_reveals_can_be_made_good():
    """Unmasking with too few reveals is refused; when more arrive it succeeds."""
    simulation = Simulation().until(Step.REVEAL)
    held_back = {name: simulation.reveals.pop(name) for name in names(8)[:4]}
    assert not simulation.can_unmask()
    with pytest.raises(QuorumError, match="4 are needed"):
        simulation.unmask()
    simulation.reveals |= held_back
    assert simulation.can_unmask()
    assert_exact(simulation.unmask(), simulation)


@pytest.mark.parametrize("num_devices", range(3, 12))
def test_every_cohort_size_over_the_complete_graph(num_devices: int):
    """Even and odd cohorts and degrees work alike, with any allowed threshold."""
    for threshold in range((num_devices - 1) // 2 + 1, num_devices):
        simulation = Simulation(make_plan(num_devices, threshold=threshold))
        assert_exact(simulation.run(), simulation)
