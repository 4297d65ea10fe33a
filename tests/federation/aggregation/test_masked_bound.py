"""A bound that follows the updates when their lengths are masked: one bit of each, in the sum."""

from dataclasses import replace
from math import exp, hypot, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.ledger import Budget, Concentrated, Gaussian, Ledger
from minga.federation.aggregation.privacy import (
    MIN_VARIANCE,
    NoiseSize,
    PrivateEncoding,
    assured_multiplier,
    distributed_rho,
    longest_levels,
    num_noisy,
    size_noise,
)
from minga.federation.errors import BudgetError, PrivacyError
from minga.federation.secagg.errors import SumError
from minga.federation.secagg.fixedpoint import decode_sum
from minga.federation.secagg.plan import RoundPlan
from tests.federation.secagg.simulator import make_plan, seeded_bytes

NUM_VALUES = 6
ADAPTIVE = AdaptiveClip(quantile=0.5, learning_rate=0.2)


def sized(
    noise_multiplier: float,
    *,
    num_values: int = NUM_VALUES,
    cohort: int = 40,
    counted: int | None = None,
    adaptive: AdaptiveClip | None = ADAPTIVE,
    max_norm: float = 1.0,
) -> tuple[NoiseSize, RoundPlan, PrivateEncoding]:
    """Size the noise of a cohort; give also the plan and the encoding of its round."""
    size = size_noise(
        noise_multiplier=noise_multiplier,
        max_norm=max_norm,
        num_values=num_values,
        num_noisy=counted or cohort,
        min_cohort=counted or cohort,
        cohort=cohort,
        adaptive=adaptive,
    )
    plan = make_plan(
        cohort,
        num_values=num_values + (adaptive is not None),
        value_bits=size.value_bits,
        clip=size.clip,
        max_weight=1,
    )
    encoding = PrivateEncoding(max_norm=max_norm, variance=size.variance, bit_level=size.bit_level)
    return size, plan, encoding


def updates_of(lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw updates of some lengths, one in each row."""
    rows = np.random.default_rng(seed).normal(size=(len(lengths), NUM_VALUES))
    rows *= (np.asarray(lengths) / np.linalg.norm(rows, axis=1))[:, None]
    return rows.astype(np.float32)


def sum_of(
    plan: RoundPlan, encoding: PrivateEncoding, updates: np.ndarray, seed: int
) -> np.ndarray:
    """Add up the levels of private updates: what is left once the masks are off."""
    levels = [
        encoding.encode(plan, one, 1, seeded_bytes((seed, number)))
        for number, one in enumerate(updates)
    ]
    return np.sum(levels, axis=0, dtype=np.uint32)


def share_in(plan: RoundPlan, encoding: PrivateEncoding, total: np.ndarray, num: int) -> float:
    """Read the share of updates within the bound from a sum."""
    mean, _ = decode_sum(plan, total, num)
    return encoding.share_within(plan, float(mean[-1]))


# --- the bits ---


@settings(max_examples=40)
@given(
    lengths=st.lists(st.floats(0.0, 3.0), min_size=3, max_size=40),
    max_norm=st.floats(0.5, 2.0),
    value_bits=st.integers(2, 24),
)
def test_masked_bits_add_up_exactly(lengths: list[float], max_norm: float, value_bits: int) -> None:
    """Without noise of devices the sum tells how many updates were within the bound, no less."""
    plan = make_plan(
        len(lengths),
        num_values=NUM_VALUES + 1,
        value_bits=value_bits,
        clip=max_norm,
        max_weight=1,
    )
    encoding = PrivateEncoding(max_norm=max_norm, bit_level=1)
    updates = updates_of(np.array(lengths))
    within = sum(np.linalg.norm(updates.astype(np.float64), axis=1) <= max_norm)
    share = share_in(plan, encoding, sum_of(plan, encoding, updates, 0), len(lengths))
    assert share * len(lengths) == pytest.approx(within, abs=1e-4)


def test_the_bit_leaves_the_update_as_it_was() -> None:
    """The coordinates before the bit are those of a round without one."""
    without = make_plan(8, num_values=NUM_VALUES, value_bits=14, clip=1.0, max_weight=1)
    with_bit = replace(without, num_values=NUM_VALUES + 1)
    for length, bit in ((0.9, 30), (1.1, -30)):
        update = updates_of(np.array([length]))[0]
        plain = PrivateEncoding(max_norm=1.0).encode(without, update, 1, seeded_bytes(1))
        told = PrivateEncoding(max_norm=1.0, bit_level=30).encode(
            with_bit, update, 1, seeded_bytes(1)
        )
        np.testing.assert_array_equal(told[:NUM_VALUES], plain[:NUM_VALUES])
        assert told.view(np.int32)[NUM_VALUES] == bit
        assert told[-1] == plain[-1] == 1


# --- the noise on both ---


@settings(max_examples=60)
@given(
    noise_multiplier=st.floats(0.1, 6),
    num_values=st.integers(1, 10_000_000),
    cohort=st.integers(128, 4096),
    quantile=st.floats(0.1, 0.9),
)
def test_bit_and_update_together_spend_what_was_asked_for(
    noise_multiplier: float, num_values: int, cohort: int, quantile: float
) -> None:
    """One noise hides both: on the bits it is a twentieth, on the updates so much more."""
    counted = num_noisy(cohort, 0.2, 0.1)
    adaptive = replace(ADAPTIVE, quantile=quantile)
    size, plan, encoding = sized(
        noise_multiplier, num_values=num_values, cohort=cohort, counted=counted, adaptive=adaptive
    )
    std = sqrt(counted * size.variance)
    on_bits, on_updates = std / (2 * size.bit_level), std / longest_levels(plan, encoding)
    # Andrew et al., theorem 1: noise_multiplier**-2 = on_updates**-2 + (2 on_bits)**-2.
    joint = hypot(1 / on_updates, 1 / (2 * on_bits))
    assert joint <= 1 / noise_multiplier * (1 + 1e-9)
    rho = distributed_rho(plan=plan, encoding=encoding, num_honest=counted)
    assert rho <= joint**2 / 2 * (1 + 1e-9)
    if size.variance > 100 * MIN_VARIANCE and size.bit_level > 100:
        assert rho == pytest.approx(1 / (2 * noise_multiplier**2), rel=0.01)
        assert on_bits / counted == pytest.approx(0.05, rel=0.02)
        assert on_updates == pytest.approx(
            adaptive.update_noise(noise_multiplier, counted), rel=0.02
        )
    # The ring holds the bits of all, and their noise.
    assert size.bit_level + 8 * sqrt(size.variance / counted) <= plan.max_level
    assert plan.ring_bits <= 32


def test_bits_cost_what_the_paper_says() -> None:
    """The ledger counts update and bit as two Gaussian sums, to the discrete noise's slack."""
    _, plan, encoding = sized(1.0, num_values=1000, cohort=100)
    joint = distributed_rho(plan=plan, encoding=encoding, num_honest=100)
    plenty = Budget(epsilon=100.0, delta=1e-5)
    apart = Ledger()
    for multiplier in (ADAPTIVE.update_noise(1.0, 100), 2 * 0.05 * 100):
        apart = apart.spend(Gaussian(noise_multiplier=multiplier), plenty)
    rho = sum(1 / (2 * entry.mechanism.noise_multiplier**2) for entry in apart.entries)
    assert joint == pytest.approx(rho, rel=1e-3)
    # A budget for one round and a half pays for one.
    spent = Ledger().spend(Concentrated(rho=joint), plenty)
    budget = Budget(epsilon=1.2 * spent.epsilon(1e-5), delta=1e-5)
    with pytest.raises(BudgetError, match="1 more round would bring"):
        spent.spend(Concentrated(rho=joint), budget)


def test_more_of_the_bit_is_less_noise() -> None:
    """A device sees through a plan whose bit is larger than the noise hides."""
    _, plan, encoding = sized(1.0)
    assert assured_multiplier(
        plan=plan, encoding=encoding, num_devices=40, colluder_share=0.0
    ) == pytest.approx(1.0, rel=0.01)
    loud = replace(encoding, bit_level=plan.max_level)
    assert assured_multiplier(plan=plan, encoding=loud, num_devices=40, colluder_share=0.0) < 0.7


def test_too_few_devices_for_a_bit() -> None:
    """Noise of few devices that hides an update may not hide its bit."""
    with pytest.raises(PrivacyError, match=r"10 devices tells more .*; it takes more than 10 dev"):
        sized(1.0, cohort=14, counted=10)
    assert sized(1.0, cohort=14, counted=11)[0].bit_level > 0


# --- the bound ---


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_bound_finds_the_quantile_through_masks(start: float) -> None:
    """From far off either way the bound comes to the quantile, by noisy sums alone, and stays."""
    num = 40
    adaptive = AdaptiveClip(quantile=0.7, learning_rate=0.6)
    lengths = np.random.default_rng(8).lognormal(sigma=0.5, size=num)
    updates = updates_of(lengths)
    norm, path, errors = start, [], []
    for number in range(32):
        _, plan, encoding = sized(1.0, cohort=num, adaptive=adaptive, max_norm=norm)
        share = share_in(plan, encoding, sum_of(plan, encoding, updates, number), num)
        errors.append(share - np.mean(lengths <= norm))
        norm = adaptive.next_norm(norm, share)
        path.append(norm)
    assert np.mean(path[-14:]) == pytest.approx(np.quantile(lengths, 0.7), rel=0.15)
    assert np.std(errors) == pytest.approx(0.05, rel=0.5)


@settings(max_examples=60)
@given(
    lie=st.integers(0, 2**32 - 1),
    num_within=st.integers(0, 9),
    noise_multiplier=st.sampled_from([0.0, 0.5]),
)
def test_a_lie_moves_the_bound_by_one_step_at_most(
    lie: int, num_within: int, noise_multiplier: float
) -> None:
    """Whatever a device sends for its bit, the bound moves no further than bits ever move it."""
    num = 10
    if noise_multiplier:
        _, plan, encoding = sized(noise_multiplier, cohort=num)
    else:
        plan = make_plan(num, num_values=NUM_VALUES + 1, value_bits=16, clip=1.0, max_weight=1)
        encoding = PrivateEncoding(max_norm=1.0, bit_level=1)
    lengths = np.array([0.5] * num_within + [1.5] * (num - 1 - num_within))
    total = sum_of(plan, encoding, updates_of(lengths), 3)
    total[-2:] += np.array([lie, 1], np.uint32)
    try:
        share = share_in(plan, encoding, total, num)
    except SumError:
        return  # no honest bits have this sum, and the round comes to nothing
    factor = ADAPTIVE.next_norm(1.0, share)
    assert exp(-0.1) <= factor <= exp(0.1)


# --- what is refused ---


def test_plan_that_cannot_hold_the_bit_is_refused() -> None:
    """A device sends no bit that wraps around, or that a rotation would spread."""
    update = updates_of(np.array([0.5]))[0]
    plan = make_plan(8, num_values=NUM_VALUES + 1, value_bits=6, clip=1.0, max_weight=1)
    assert plan.max_level == 31
    PrivateEncoding(max_norm=1.0, bit_level=31).encode(plan, update, 1, seeded_bytes(0))
    for encoding, round_plan in (
        (PrivateEncoding(max_norm=1.0, bit_level=32), plan),
        (PrivateEncoding(max_norm=1.0, bit_level=1), replace(plan, rotate=True)),
    ):
        with pytest.raises(PrivacyError, match="must hold it, and must not rotate it"):
            encoding.encode(round_plan, update, 1, seeded_bytes(0))
    with pytest.raises(PrivacyError, match="bit_level is -1"):
        PrivateEncoding(max_norm=1.0, bit_level=-1)
