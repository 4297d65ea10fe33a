"""One masked update tells nothing: whatever is in it, it looks like random bits.

Statistics on uploads of the most telling updates there are, and the same statistics on uploads
whose masks were taken off, so that it shows that they would notice. Everything is drawn from seeds:
a test that passes once passes always.
"""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from minga.federation.secagg import agreement
from minga.federation.secagg.device import Step
from minga.federation.secagg.errors import SumError
from minga.federation.secagg.masking import Mask, apply_masks
from minga.federation.secagg.packing import pack, unpack

from .simulator import WEIGHT_UNIT, Simulation, make_plan, seeded_bytes

SIZE = 20_000
CLIP = float(2**19 - 1)
LEAST_P = 1e-6
"""Of some thousands of honest statistics, none should be so unlikely."""

Levels = NDArray[np.int64]

EXTREMES: dict[str, Callable[[int], NDArray[np.float32]]] = {
    "zero": lambda _: np.zeros(SIZE, np.float32),
    "largest": lambda _: np.full(SIZE, CLIP, np.float32),
    "smallest": lambda _: np.full(SIZE, -CLIP, np.float32),
    "alternating": lambda _: CLIP * np.where(np.arange(SIZE) % 2, 1, -1).astype(np.float32),
    "one spike": lambda k: np.eye(1, SIZE, k, dtype=np.float32)[0] * np.float32(CLIP),
    "a slope": lambda _: np.linspace(-CLIP, CLIP, SIZE, dtype=np.float32),
}


def simulate(update: Callable[[int], NDArray[np.float32]], seed: int = 0) -> Simulation:
    """Let eight devices mask the same kind of update."""
    simulation = Simulation(make_plan(8, num_values=SIZE), seed=seed)
    simulation.deltas = {name: update(k) for k, name in enumerate(simulation.ids)}
    simulation.weights = dict.fromkeys(simulation.ids, WEIGHT_UNIT)
    return simulation.until(Step.MASK)


def levels_of(simulation: Simulation, name: str) -> Levels:
    """Read an upload without the weight."""
    plan = simulation.plan
    return unpack(simulation.uploads[name], plan.vector_length, plan.ring_bits)[:-1].astype(int)


def p_values(levels: Levels, ring_bits: int) -> Iterator[float]:
    """Compare ring values with uniform ones: lowest and highest byte, every bit, neighbours."""
    for shift in (0, ring_bits - 8):
        counts = np.bincount(levels >> shift & 0xFF, minlength=256)
        yield float(stats.chisquare(counts).pvalue)
    for bit in range(ring_bits):
        surplus = (levels >> bit & 1).mean() - 0.5
        yield float(2 * stats.norm.sf(abs(surplus) * 2 * np.sqrt(levels.size)))
    yield correlation_p(levels[:-1], levels[1:])


def correlation_p(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    """Say how likely so strong a correlation is by chance; a constant correlates with nothing."""
    if not (np.ptp(one) and np.ptp(other)):
        return 1.0
    return float(stats.pearsonr(one.astype(float), other.astype(float)).pvalue)


@pytest.mark.parametrize("kind", EXTREMES)
def test_every_masked_update_is_uniform(kind: str):
    """Over all devices and two rounds, bytes and bits of uploads are those of random ones."""
    for seed in (0, 1):
        simulation = simulate(EXTREMES[kind], seed)
        for name in simulation.ids:
            levels = levels_of(simulation, name)
            assert min(p_values(levels, simulation.plan.ring_bits)) > LEAST_P, name


@pytest.mark.parametrize("kind", ["one spike", "a slope", "alternating"])
def test_masked_updates_correlate_with_nothing(kind: str):
    """An upload tells nothing of its update, of another upload, or of the same in another round."""
    simulation = simulate(EXTREMES[kind])
    tomorrow = Simulation(make_plan(8, num_values=SIZE, round_id=b"tomorrow's round"))
    tomorrow.deltas, tomorrow.weights = simulation.deltas, simulation.weights
    tomorrow.until(Step.MASK)
    uploads = {name: levels_of(simulation, name) for name in simulation.ids}
    for name, levels in uploads.items():
        assert correlation_p(levels, simulation.deltas[name]) > LEAST_P
        assert correlation_p(levels, levels_of(tomorrow, name)) > LEAST_P
    for one, other in combinations(uploads, 2):
        assert correlation_p(uploads[one], uploads[other]) > LEAST_P


def masks_of(simulation: Simulation, name: str, seed: int = 0) -> list[Mask]:
    """Make a device's masks from its secrets, which the simulation draws first."""
    plan, draw = simulation.plan, seeded_bytes((seed, name))
    self_seed, pair = draw(32), agreement.KeyPair.from_secret(draw(32))
    own, adverts = simulation.adverts[name], simulation.adverts
    return [
        agreement.self_mask(plan, name, self_seed),
        *(agreement.pair_mask(plan, pair, own, adverts[peer]) for peer in simulation.graph[name]),
    ]


def without(levels: Levels, masks: list[Mask], ring_bits: int) -> Levels:
    """Take masks off an upload's values."""
    values = levels.astype(np.uint32)
    apply_masks(values, [mask.inverse() for mask in masks])
    return values.astype(int) & (1 << ring_bits) - 1


@pytest.mark.parametrize("kind", EXTREMES)
def test_the_last_mask_hides_as_well_as_all(kind: str):
    """Whichever single mask is left, nothing shows; with none left the same statistics cry out."""
    simulation = simulate(EXTREMES[kind])
    name, bits = "device-03", simulation.plan.ring_bits
    levels, masks = levels_of(simulation, name), masks_of(simulation, name)
    assert len(masks) == 8
    for kept in range(len(masks)):
        others = masks[:kept] + masks[kept + 1 :]
        assert min(p_values(without(levels, others, bits), bits)) > LEAST_P
    bare = without(levels, masks, bits)
    assert min(p_values(bare, bits)) < 1e-100


@pytest.mark.parametrize("kind", ["alternating", "a slope"])
def test_without_masks_an_upload_correlates_with_its_update(kind: str):
    """What the statistics do not find in masked uploads is there in bare ones."""
    simulation = simulate(EXTREMES[kind])
    name, bits = "device-03", simulation.plan.ring_bits
    bare = without(levels_of(simulation, name), masks_of(simulation, name), bits)
    assert correlation_p(bare, simulation.deltas[name]) < 1e-100


def test_a_mask_that_is_left_out_spoils_the_sum():
    """Whichever of a device's masks is missing, the sum is refused: a forgotten mask shows."""
    simulation = simulate(EXTREMES["zero"]).confirm().reveal()
    plan, name = simulation.plan, "device-03"
    whole = simulation.uploads[name]
    for mask in masks_of(simulation, name):
        values = unpack(whole, plan.vector_length, plan.ring_bits)
        apply_masks(values, [mask.inverse()])
        simulation.uploads[name] = pack(values, plan.ring_bits)
        with pytest.raises(SumError):
            simulation.unmask()
