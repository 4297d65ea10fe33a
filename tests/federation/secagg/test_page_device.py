"""The protocol's page says enough: a device written from it takes part in rounds."""

from dataclasses import asdict

import numpy as np
import pytest

from minga.federation.secagg.device import Step
from minga.federation.secagg.plan import RoundPlan

from .page_device import PageDevice
from .simulator import Simulation, make_plan, seeded_bytes


def with_page_devices(simulation: Simulation, *names: str) -> Simulation:
    """Put devices of the other implementation in the place of some."""
    for name in names:
        draw = seeded_bytes((simulation.seed, name))
        fields = asdict(simulation.plan)
        simulation.sessions[name] = PageDevice(fields, simulation.signers[name], draw)
    return simulation


PLANS = {
    "plain": make_plan(),
    "sparse": make_plan(12, num_neighbours=6, threshold=4),
    "two blocks": make_plan(num_values=70),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_byte_is_the_same(plan: RoundPlan):
    """From the same randomness it sends what the product's device sends, in every stage."""
    ours, theirs = Simulation(plan), Simulation(plan)
    with_page_devices(theirs, "device-02", "device-05").run()
    ours.run()
    for name in ("adverts", "shares", "uploads", "confirmations", "reveals"):
        assert getattr(theirs, name) == getattr(ours, name), name


def test_losses_between_both_kinds():
    """Whichever kind is lost, the other's shares take its masks off: the mean is exact."""
    lost = {"device-01": Step.MASK, "device-02": Step.MASK, "device-04": Step.CONFIRM}
    simulation = Simulation(lost_before=lost)
    with_page_devices(simulation, "device-02", "device-03", "device-04")
    result = simulation.run()
    assert simulation.survivors == [n for n in simulation.ids if n not in list(lost)[:2]]
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())


def test_it_rotates_alike():
    """A rotated sum over both kinds is the mean, within a level of each device in each block."""
    plan = make_plan(num_values=70, rotate=True, clip=8.0)
    simulation = with_page_devices(Simulation(plan), "device-00", "device-06")
    rng = np.random.default_rng(0)
    simulation.deltas = {n: rng.standard_normal(70).astype(np.float32) for n in simulation.ids}
    result = simulation.run()
    weights = [simulation.weights[name] for name in simulation.ids]
    mean = np.average(list(simulation.deltas.values()), axis=0, weights=weights)
    step = plan.clip / plan.max_level * plan.max_weight / sum(weights)
    assert np.abs(result.mean_delta - mean).max() < 8 * 8 * step
