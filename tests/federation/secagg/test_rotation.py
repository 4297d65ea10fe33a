"""The random rotation: what it keeps, what it spreads, and what it does to the error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from minga.federation.secagg.errors import UpdateError
from minga.federation.secagg.fixedpoint import decode_sum, encode_update
from minga.federation.secagg.masking import Keystream, new_scratch
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.rotation import (
    MAX_BLOCK,
    MIN_BLOCK,
    block_size,
    padded_size,
    rotate,
    rotate_back,
)

from .simulator import Simulation, make_plan, seeded_bytes

KEY = bytes(range(16))


def drawn(num_values: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(num_values).astype(np.float32)


@pytest.mark.parametrize("num_values", [1, 63, 64, 65, 5000, 200_001])
def test_rotating_back_gives_the_vector(num_values: int):
    """A rotation and its inverse change nothing but the last bits, and leave the input alone."""
    values = drawn(num_values)
    before = values.copy()
    rotated = rotate(values, KEY)
    assert rotated.shape == (padded_size(num_values),)
    np.testing.assert_array_equal(values, before)
    back = rotate_back(rotated, num_values, KEY)
    assert back.shape == values.shape
    np.testing.assert_allclose(back, values, atol=4e-6)


def test_it_is_the_transform_that_the_documentation_states():
    """Signs from the keystream, blocks of every n-th coordinate, Sylvester's Hadamard matrix."""
    num_values = 300
    block, values = block_size(num_values), drawn(num_values)
    padded = np.zeros(padded_size(num_values))
    padded[:num_values] = values
    stream = Keystream(KEY).next_into(new_scratch(), 64).tobytes()
    signs = [-1 if stream[i // 8] >> (i % 8) & 1 else 1 for i in range(padded.size)]
    matrix = (padded * signs).reshape(block, -1)
    expected = hadamard(block) @ matrix / math.sqrt(block)
    np.testing.assert_allclose(rotate(values, KEY), expected.ravel(), atol=1e-5)


@given(num_values=st.integers(1, 10**9))
def test_padding_is_small(num_values: int):
    """Blocks are powers of two, and padding stays within 3 % or one smallest block."""
    block, padded = block_size(num_values), padded_size(num_values)
    assert block in (64, 128, 256, 512, 1024, 2048, 4096)
    assert MIN_BLOCK <= block <= MAX_BLOCK
    assert padded % block == 0
    assert 0 <= padded - num_values < max(MIN_BLOCK, num_values / 32)


def test_sums_commute_with_the_rotation():
    """The sum of rotated vectors is the rotated sum: that is what lets the coordinator undo it."""
    one, other = drawn(5000, 1), drawn(5000, 2)
    np.testing.assert_allclose(
        rotate(one, KEY) + rotate(other, KEY), rotate(one + other, KEY), atol=1e-5
    )


def test_a_spike_is_spread():
    """One large value among zeros becomes as many small ones as a block has; so is any layer."""
    values = np.zeros(1_000_000, np.float32)
    values[12_345] = 1.0
    rotated = np.abs(rotate(values, KEY))
    assert rotated.max() == pytest.approx(1 / math.sqrt(MAX_BLOCK))
    assert np.count_nonzero(rotated) == MAX_BLOCK
    layer = np.zeros(1_000_000, np.float32)
    layer[-2000:] = 1.0  # its mean square is 1/500
    assert np.abs(rotate(layer, KEY)).max() < 6 * math.sqrt(2000 / 1_000_000)


def test_coordinates_exceed_the_bound_as_rarely_as_stated():
    """Over many keys no more coordinates exceed c than Hoeffding's bound allows."""
    values = drawn(4096) ** 5  # heavy tails
    shape = (block_size(values.size), -1)
    root_mean_square = np.sqrt(np.square(values.reshape(shape)).mean(axis=0))
    rotated = np.stack([rotate(values, bytes([seed] * 16)).reshape(shape) for seed in range(50)])
    for sigmas in (2.0, 3.0, 4.0):
        bound = 2 * math.exp(-(sigmas**2) / 2)
        assert (np.abs(rotated) > sigmas * root_mean_square).mean() <= bound


def test_other_keys_rotate_otherwise():
    """Each round has signs of its own, from its plan."""
    plan = make_plan(num_values=1000, rotate=True)
    other = make_plan(num_values=1000, rotate=True, round_id=b"another round.. ")
    assert plan.rotation_key != other.rotation_key
    values = drawn(1000)
    assert (rotate(values, plan.rotation_key) != rotate(values, other.rotation_key)).any()


def real_plan(num_values: int, **changes: object) -> RoundPlan:
    numbers = {"clip": 1.0, "value_bits": 12, "max_weight": 1000, "rotate": True}
    return make_plan(num_values=num_values, **(numbers | changes))


def mean_error(plan: RoundPlan, deltas: np.ndarray, weights: list[int]) -> np.ndarray:
    """Encode, add and decode; give what is wrong with the mean, in levels of it."""
    levels = sum(
        encode_update(plan, delta, weight, seeded_bytes(number))
        for number, (delta, weight) in enumerate(zip(deltas, weights, strict=True))
    )
    mean, total = decode_sum(plan, levels, len(weights))
    assert total == sum(weights)
    step = plan.clip / plan.max_level * plan.max_weight / total
    return (mean - np.average(deltas.astype(np.float64), axis=0, weights=weights)) / step


@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("weights", [[1000], [1000] * 8, [1, 20, 300, 1000]], ids=len)
def test_error_keeps_its_bounds(is_rotated: bool, weights: list[int]):
    """With and without the rotation: mean zero, the stated deviation, tail, and strict bound."""
    plan = real_plan(20_000, rotate=is_rotated)
    n, size = len(weights), plan.num_values
    deltas = 0.1 * np.stack([drawn(size, seed) for seed in range(n)])
    error = mean_error(plan, deltas, weights)
    deviation = math.sqrt(n) / 2
    assert abs(error.mean()) < 5 * deviation / math.sqrt(size)
    assert error.std() <= 1.02 * deviation
    for p in (0.1, 0.01):
        assert (np.abs(error) > math.sqrt(n / 2 * math.log(2 / p))).mean() <= p
    strict = n * math.sqrt(block_size(size)) if is_rotated else n
    assert np.abs(error).max() <= strict


def test_a_smaller_range_holds_rotated_updates():
    """With one value of a hundred 50 times as large, the rotation saves two bits at equal error.

    Unrotated the range must reach 0.5; rotated 0.1 holds all coordinates.
    """
    size, weights = 50_000, [500] * 4
    deltas = 0.003 * np.stack([drawn(size, seed) for seed in range(4)])
    deltas[:, ::100] *= 50
    deltas = deltas.clip(-0.5, 0.5)

    def deviation(**changes: object) -> float:
        plan = real_plan(size, max_weight=500, **changes)
        step = plan.clip / plan.max_level / len(weights)
        return float(np.sqrt(np.square(mean_error(plan, deltas, weights) * step).mean()))

    plain = deviation(rotate=False, clip=0.5, value_bits=12)
    rotated = deviation(rotate=True, clip=0.1, value_bits=10)
    clipped = deviation(rotate=False, clip=0.1, value_bits=10)
    assert rotated < plain
    assert clipped > 10 * rotated


def test_updates_that_are_no_numbers_are_refused():
    """One NaN spreads over its block, and is found there."""
    delta = np.zeros(200, np.float32)
    delta[-1] = np.nan
    with pytest.raises(UpdateError, match="NaN or infinity"):
        encode_update(real_plan(200), delta, 1, seeded_bytes(0))


def test_a_whole_round_with_the_rotation():
    """Real keys and masks, a device lost: the mean is right within one level of each device."""
    plan = real_plan(500, max_weight=16, max_cohort=8)
    simulation = Simulation(plan)
    simulation.deltas = {n: drawn(500, k) / 10 for k, n in enumerate(simulation.ids)}
    result = simulation.run()
    weights = [simulation.weights[name] for name in simulation.ids]
    expected = np.average(list(simulation.deltas.values()), axis=0, weights=weights)
    step = plan.clip / plan.max_level * plan.max_weight / sum(weights)
    assert np.abs(result.mean_delta - expected).max() < 8 * step
    assert result.mean_delta.shape == (500,)
