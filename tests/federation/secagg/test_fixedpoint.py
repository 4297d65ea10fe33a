"""Updates as fixed-point levels, and their sum as a mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.errors import SumError, UpdateError
from minga.federation.secagg.fixedpoint import decode_sum, encode_update
from minga.federation.secagg.plan import RoundPlan

from .simulator import make_plan, seeded_bytes

FLOAT32_STEP = 2.0**-23
finite = st.floats(-100, 100, width=32)


def real_plan(num_values: int, **changes: object) -> RoundPlan:
    numbers = {"clip": 4.0, "value_bits": 16, "max_weight": 1000}
    return make_plan(num_values=num_values, **(numbers | changes))


def vector(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


@given(
    updates=st.lists(
        st.tuples(st.lists(finite, min_size=3, max_size=3), st.integers(1, 1000)),
        min_size=1,
        max_size=8,
    ),
    value_bits=st.integers(12, 28),
    clip=st.floats(0.01, 50),
    seed=st.integers(0, 2**32),
)
def test_mean_is_within_the_stated_bound(
    updates: list[tuple[list[float], int]], value_bits: int, clip: float, seed: int
):
    """Encoding, summing and decoding gives the clipped weighted mean within the error bound."""
    plan = real_plan(3, value_bits=value_bits, clip=clip)
    draw = seeded_bytes(seed)
    levels = sum(encode_update(plan, vector(*delta), weight, draw) for delta, weight in updates)
    mean, total = decode_sum(plan, levels, len(updates))
    weights = [weight for _, weight in updates]
    clipped = np.clip([delta for delta, _ in updates], -clip, clip)
    bound = len(updates) * clip / plan.max_level * plan.max_weight / total
    assert total == sum(weights)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(
        mean, np.average(clipped, axis=0, weights=weights), rtol=FLOAT32_STEP, atol=bound
    )


def test_rounding_is_unbiased():
    """The mean over many roundings of one value comes to the value, within five sigma."""
    plan = real_plan(100_000)
    step = plan.clip / plan.max_level
    for fraction in (0.03, 0.5, 0.9, -0.25):
        value = np.float32((100 + fraction) * step)
        delta = np.full(plan.num_values, value)
        mean, _ = decode_sum(plan, encode_update(plan, delta, 1000, seeded_bytes(fraction)), 1)
        sigma = step * 0.5 / np.sqrt(plan.num_values)
        assert abs(mean.astype(np.float64).mean() - value) < 5 * sigma


def test_zero_stays_zero():
    """A coordinate that did not move adds nothing at all, at any weight."""
    plan = real_plan(10_000)
    levels = encode_update(plan, np.zeros(plan.num_values, np.float32), 7, seeded_bytes(0))
    assert not levels[:-1].any()


def test_the_extremes_reach_the_last_level_and_no_further():
    """Clipped values take the outermost levels exactly, so a cohort of them still fits the ring."""
    plan = real_plan(4, value_bits=29)
    delta = vector(1e30, -1e30, 4.0, -4.0)
    levels = encode_update(plan, delta, 1000, seeded_bytes(0)).view(np.int32)
    assert levels[:4].tolist() == [plan.max_level, -plan.max_level] * 2
    cohort = sum(encode_update(plan, delta, 1000, seeded_bytes(n)) for n in range(plan.max_cohort))
    mean, total = decode_sum(plan, cohort, plan.max_cohort)
    assert mean.tolist() == [4.0, -4.0, 4.0, -4.0]
    assert total == 8000


def test_weights_weigh():
    """Three parts of one update and one part of another make the mean three to one."""
    plan = real_plan(1, clip=1.0, value_bits=24)
    levels = encode_update(plan, vector(1.0), 300, seeded_bytes(1))
    levels += encode_update(plan, vector(-1.0), 100, seeded_bytes(2))
    mean, total = decode_sum(plan, levels, 2)
    assert total == 400
    assert mean[0] == pytest.approx(0.5, abs=1e-5)


def test_long_vectors_round_each_block_anew():
    """No two blocks of a long vector share their random bits."""
    plan = real_plan(2 * BLOCK_VALUES + 5)
    delta = np.full(plan.num_values, 0.5 * plan.clip / plan.max_level, np.float32)
    levels = encode_update(plan, delta, 1000, seeded_bytes(0))
    assert (levels[:BLOCK_VALUES] != levels[BLOCK_VALUES : 2 * BLOCK_VALUES]).any()


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_updates_that_are_no_numbers_are_refused(spoilt: float):
    """NaN and infinity never enter a sum, wherever in the vector they are."""
    plan = real_plan(BLOCK_VALUES + 2)
    delta = np.zeros(plan.num_values, np.float32)
    delta[-1] = spoilt
    with pytest.raises(UpdateError, match="NaN or infinity"):
        encode_update(plan, delta, 1, seeded_bytes(0))


@pytest.mark.parametrize(
    "delta",
    [np.zeros(3, np.float32), np.zeros((2, 2), np.float32), np.zeros(4), np.zeros(4, np.int32)],
)
def test_updates_of_another_form_are_refused(delta: NDArray[np.float32]):
    """Nothing is cut, broadcast or converted."""
    with pytest.raises(UpdateError, match=r"expected float32 of shape \(4,\)"):
        encode_update(real_plan(4), delta, 1, seeded_bytes(0))


@pytest.mark.parametrize("weight", [0, -1, 1001])
def test_weights_out_of_range_are_refused(weight: int):
    """A weight that could overflow the ring, or take part with nothing, is refused."""
    with pytest.raises(UpdateError, match="expected 1 to 1000"):
        encode_update(real_plan(1), vector(0.0), weight, seeded_bytes(0))


@pytest.mark.parametrize("total_weight", [0, 1, 2001, -5])
def test_sums_with_impossible_weights_are_refused(total_weight: int):
    """Two devices weigh between 2 and twice the maximum, or somebody lied."""
    levels = np.array([0, total_weight], np.int32).view(np.uint32)
    with pytest.raises(SumError, match=f"total weight of {total_weight}"):
        decode_sum(real_plan(1), levels, 2)


def test_sums_out_of_reach_are_refused():
    """A coordinate beyond what clipped updates of that weight reach gives the liar away."""
    plan = real_plan(1)
    limit = plan.max_level // 2 + 1  # one device with half of the weight, rounded up
    assert decode_sum(plan, np.array([limit, 500], np.uint32), 1)[1] == 500
    with pytest.raises(SumError, match="outside"):
        decode_sum(plan, np.array([limit + 1, 500], np.uint32), 1)
