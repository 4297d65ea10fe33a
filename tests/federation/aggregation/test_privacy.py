"""One device's influence is bounded, and the noise of a cohort is as strong as it was sized."""

import os
from dataclasses import replace
from math import exp, pi, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.ledger import Budget, Concentrated, Gaussian, Ledger
from minga.federation.aggregation.noise import MAX_VARIANCE
from minga.federation.aggregation.privacy import (
    MIN_VARIANCE,
    NoiseSize,
    PrivateEncoding,
    central_std,
    clip_length,
    distributed_rho,
    level_bound,
    norm_in_levels,
    num_noisy,
    size_noise,
)
from minga.federation.errors import PrivacyError
from minga.federation.secagg.errors import UpdateError
from minga.federation.secagg.fixedpoint import decode_sum
from minga.federation.secagg.plan import RoundPlan
from tests.federation.secagg.simulator import make_plan, seeded_bytes

MAX_NORM = 1.5


def private_plan(num_values: int, cohort: int = 8, **changes: object) -> RoundPlan:
    """Make a plan in which all devices weigh the same."""
    numbers = {"clip": MAX_NORM, "value_bits": 14, "max_weight": 1}
    return make_plan(cohort, num_values=num_values, **(numbers | changes))


def sized_plan(size: NoiseSize, num_values: int, cohort: int) -> RoundPlan:
    """Make the plan that goes with sized noise."""
    return private_plan(num_values, cohort, value_bits=size.value_bits, clip=size.clip)


def update_of(length: float, num_values: int, seed: int = 0) -> np.ndarray:
    """Draw an update of some length."""
    direction = np.random.default_rng(seed).normal(size=num_values)
    return (direction * length / np.linalg.norm(direction)).astype(np.float32)


def shares_of(variance: int) -> PrivateEncoding:
    """Give how devices add shares of noise."""
    return PrivateEncoding(max_norm=MAX_NORM, variance=variance)


def signed(levels: np.ndarray) -> np.ndarray:
    """Read levels that are not masked as integers, without the weight."""
    return levels[:-1].view(np.int32).astype(np.int64)


# --- lengths ---


@given(
    update=arrays(np.float32, 7, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    max_norm=st.floats(1e-3, 1e3),
)
def test_no_update_is_longer_than_the_bound(update: np.ndarray, max_norm: float) -> None:
    """What was longer is exactly as long, to float32's rounding, and points the same way."""
    before = update.copy()
    shortened, was_within = clip_length(update, max_norm)
    length = np.linalg.norm(update.astype(np.float64))
    assert np.linalg.norm(shortened.astype(np.float64)) <= max_norm
    assert was_within == (length <= max_norm)
    np.testing.assert_array_equal(update, before)
    if was_within:
        np.testing.assert_array_equal(shortened, update)
    else:
        np.testing.assert_allclose(
            shortened, update.astype(np.float64) * max_norm / length, rtol=1e-5, atol=1e-37
        )


def test_update_without_a_length() -> None:
    """NaN and infinity are refused on the device."""
    for poison in (np.nan, np.inf):
        with pytest.raises(PrivacyError, match="NaN or infinity"):
            clip_length(np.array([1.0, poison], np.float32), 1.0)


@settings(max_examples=60)
@given(
    num_values=st.integers(1, 300),
    value_bits=st.integers(4, 20),
    room=st.sampled_from([1, 2, 8]),
    length=st.floats(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_levels_are_never_longer_than_their_bound(
    num_values: int, value_bits: int, room: int, length: float, seed: int
) -> None:
    """Whatever the update and the coins, rounding does not pass what noise is sized by."""
    plan = private_plan(num_values, value_bits=value_bits, clip=room * MAX_NORM)
    encoding = PrivateEncoding(max_norm=MAX_NORM)
    levels = encoding.encode(plan, update_of(length, num_values, seed), 1, seeded_bytes(seed))
    bound = level_bound(norm_in_levels(plan, MAX_NORM), num_values)
    assert np.linalg.norm(signed(levels)) <= bound
    assert levels[-1] == 1


def test_unlucky_coins_change_nothing() -> None:
    """Coins that round every coordinate up are thrown again, then done without: never too long."""
    num_values = 4000
    plan = private_plan(num_values, value_bits=6)
    update = np.full(num_values, MAX_NORM / sqrt(num_values), np.float32)  # a level of 0.49 each
    bound = level_bound(norm_in_levels(plan, MAX_NORM), num_values)
    assert sqrt(num_values) > bound  # what rounding up everywhere would give

    class Up:
        """A keystream whose every value is the largest."""

        def __init__(self, key: bytes) -> None: ...

        def next_into(self, scratch: bytearray, num: int) -> np.ndarray:
            return np.full(num, 2**32 - 1, np.uint32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minga.federation.secagg.fixedpoint.Keystream", Up)
        levels = PrivateEncoding(max_norm=MAX_NORM).encode(plan, update, 1, os.urandom)
    assert np.linalg.norm(signed(levels)) <= bound
    honest = PrivateEncoding(max_norm=MAX_NORM).encode(plan, update, 1, os.urandom)
    assert np.linalg.norm(signed(honest)) * plan.clip / plan.max_level > 0.8 * MAX_NORM


def test_most_roundings_are_right_at_once() -> None:
    """The mean of many private updates is the update: rounding again biases nothing visible."""
    plan = private_plan(500, value_bits=8)
    update = update_of(MAX_NORM, 500)
    encoding = PrivateEncoding(max_norm=MAX_NORM)
    draws = [signed(encoding.encode(plan, update, 1, seeded_bytes(n))) for n in range(400)]
    mean = np.mean(draws, axis=0) * plan.clip / plan.max_level
    step = plan.clip / plan.max_level
    assert np.abs(mean - update).max() < 5 * 0.5 * step / sqrt(400)


# --- noise ---


def test_cohort_without_its_dropouts_has_the_noise_asked_for() -> None:
    """The devices counted on alone make up the variance; with all the others there is more."""
    num_values, cohort = 10_000, 20
    counted = num_noisy(cohort, expected_dropout=0.2, colluder_share=0.1)
    assert counted == 14
    size = size_noise(
        noise_multiplier=2.0,
        max_norm=MAX_NORM,
        num_values=num_values,
        num_noisy=counted,
        min_cohort=10,
        cohort=cohort,
    )
    plan = sized_plan(size, num_values, cohort)
    encoding = PrivateEncoding(max_norm=MAX_NORM, variance=size.variance)
    zeros = np.zeros(num_values, np.float32)
    shares = [encoding.encode(plan, zeros, 1, seeded_bytes(n)) for n in range(cohort)]
    for num in (counted, cohort):
        total = np.sum(shares[:num], axis=0, dtype=np.uint32)
        mean, weight = decode_sum(plan, total, num)
        noise = mean * num
        assert weight == num
        # level_bound is 0.1 % above the norm here
        wanted = 2.0 * MAX_NORM * sqrt(num / counted)
        assert noise.std() == pytest.approx(wanted, rel=0.03)
        assert stats.kstest(noise / noise.std(), "norm").pvalue > 1e-4


def test_private_mean_is_the_mean() -> None:
    """Through masking's integers the mean of private updates is right but for the noise."""
    num_values, cohort = 3000, 40
    size = size_noise(
        noise_multiplier=0.1,
        max_norm=MAX_NORM,
        num_values=num_values,
        num_noisy=30,
        min_cohort=30,
        cohort=cohort,
    )
    plan = sized_plan(size, num_values, cohort)
    updates = [update_of(1.0, num_values, seed) for seed in range(cohort)]
    encoding = PrivateEncoding(max_norm=MAX_NORM, variance=size.variance)
    total = np.sum(
        [encoding.encode(plan, one, 1, seeded_bytes(n)) for n, one in enumerate(updates)],
        axis=0,
        dtype=np.uint32,
    )
    mean, _ = decode_sum(plan, total, cohort)
    sigma = 0.1 * MAX_NORM * sqrt(cohort / 30) / cohort
    error = (mean - np.mean(updates, axis=0)) / sigma
    assert np.abs(error).max() < 6
    assert error.std() == pytest.approx(1.0, abs=0.1)


@settings(max_examples=60)
@given(
    noise_multiplier=st.floats(0.05, 15),
    num_values=st.integers(1, 10_000_000),
    cohort=st.integers(64, 4096),
)
def test_sized_noise_fits(noise_multiplier: float, num_values: int, cohort: int) -> None:
    """Levels, noise and ring fit each other, and spend what the noise multiplier says or less."""
    counted = num_noisy(cohort, 0.2, 0.1)
    size = size_noise(
        noise_multiplier=noise_multiplier,
        max_norm=MAX_NORM,
        num_values=num_values,
        num_noisy=counted,
        min_cohort=counted,
        cohort=cohort,
    )
    assert MIN_VARIANCE <= size.variance <= MAX_VARIANCE
    plan = sized_plan(size, num_values, cohort)
    norm = norm_in_levels(plan, MAX_NORM)
    assert counted * norm + 8 * sqrt(counted * size.variance) <= counted * plan.max_level * 1.001
    rho = distributed_rho(plan=plan, encoding=shares_of(size.variance), num_honest=counted)
    assert rho <= 1 / (2 * noise_multiplier**2) * (1 + 1e-9)
    assert rho >= 0.9 / (2 * noise_multiplier**2) or size.variance < 100


def test_noise_makes_uploads_smaller() -> None:
    """Levels finer than the noise are not sent: 20 bits a value, where the defaults take 25."""
    size = size_noise(
        noise_multiplier=4.0,
        max_norm=1.0,
        num_values=1_000_000,
        num_noisy=22,
        min_cohort=20,
        cohort=32,
    )
    assert sized_plan(size, 1_000_000, 32).ring_bits == 20


def test_no_levels_for_next_to_no_noise() -> None:
    """Noise much finer than the finest level is refused, with what to do."""
    with pytest.raises(PrivacyError, match="no levels suit a noise_multiplier of 1e-08"):
        size_noise(
            noise_multiplier=1e-8,
            max_norm=1.0,
            num_values=10,
            num_noisy=4,
            min_cohort=4,
            cohort=8,
        )


# --- what is spent ---


def test_distributed_noise_by_hand() -> None:
    """The published bound, worked out for three devices with little noise."""
    plan = private_plan(100, value_bits=4, clip=MAX_NORM)
    bound = min(sqrt(49 + 25 + 4 * (7 + 5)), 7 + 10)
    assert level_bound(7.0, 100) == bound
    gap = 10 * (exp(-(pi**2) * 4) + exp(-2 * pi**2 * 4 * 2 / 3))
    ratio = bound / sqrt(12)
    expected = min(ratio**2 + gap * 50, (ratio + gap * 10) ** 2) / 2
    rho = distributed_rho(plan=plan, encoding=shares_of(4), num_honest=3)
    assert rho == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(bound**2 / 24, rel=1e-9)


def test_fewer_honest_devices_spend_more() -> None:
    """What was lost beyond the expected is charged, and no honest device means no privacy."""
    plan = private_plan(100)
    spent = [
        distributed_rho(plan=plan, encoding=shares_of(1000), num_honest=num) for num in (2, 4, 8)
    ]
    assert spent[0] == pytest.approx(2 * spent[1], rel=1e-9)
    assert spent[1] == pytest.approx(2 * spent[2], rel=1e-9)
    with pytest.raises(PrivacyError, match="no device in the sum"):
        distributed_rho(plan=plan, encoding=shares_of(1000), num_honest=0)


def test_distributed_noise_costs_what_central_noise_does() -> None:
    """For the same noise multiplier both spend the same epsilon, to the accountant's slack."""
    size = size_noise(
        noise_multiplier=4.0,
        max_norm=1.0,
        num_values=1_000_000,
        num_noisy=64,
        min_cohort=64,
        cohort=80,
    )
    plan = sized_plan(size, 1_000_000, 80)
    encoding = PrivateEncoding(max_norm=1.0, variance=size.variance)
    rho = distributed_rho(plan=plan, encoding=encoding, num_honest=64)
    plenty = Budget(epsilon=100.0, delta=1e-6)
    distributed = Ledger().spend(Concentrated(rho=rho), plenty).epsilon(1e-6)
    central = Ledger().spend(Gaussian(noise_multiplier=4.0), plenty).epsilon(1e-6)
    assert central < distributed < 1.15 * central


def test_central_noise_is_in_proportion() -> None:
    """The mean's noise is the sum's over the number of devices."""
    assert central_std(noise_multiplier=2.0, max_norm=3.0, num_devices=10) == pytest.approx(0.6)


def test_neighbours_cannot_be_told_apart_better_than_promised() -> None:
    """An attacker who knows all but one update does no better than epsilon at delta allows."""
    num_trials = 100_000
    plan = private_plan(num_trials, value_bits=8, clip=4 * MAX_NORM)
    rho = distributed_rho(plan=replace(plan, num_values=1), encoding=shares_of(250), num_honest=4)
    delta = 1e-2
    epsilon = Ledger().spend(Concentrated(rho=rho), Budget(epsilon=9, delta=delta)).epsilon(delta)
    # Each coordinate is a trial of its own: four shares of noise, and the victim's level or zero.
    noise = PrivateEncoding(max_norm=MAX_NORM, variance=250)
    zeros = np.zeros(num_trials, np.float32)
    without = sum(signed(noise.encode(plan, zeros, 1, seeded_bytes(seed))) for seed in range(4))
    victim = PrivateEncoding(max_norm=MAX_NORM).encode(
        replace(plan, num_values=1), np.array([MAX_NORM], np.float32), 1, os.urandom
    )
    assert signed(victim)[0] in (31, 32)
    with_it = without + signed(victim)[0]
    slack = 5 * 0.5 / sqrt(num_trials) * (1 + exp(epsilon))
    for threshold in range(-120, 150, 5):
        p, q = np.mean(with_it > threshold), np.mean(without > threshold)
        assert p <= exp(epsilon) * q + delta + slack
        assert 1 - q <= exp(epsilon) * (1 - p) + delta + slack


# --- what is refused ---


@pytest.mark.parametrize("variance", [1, 3, MAX_VARIANCE + 1, -5])
def test_impossible_share_of_noise(variance: int) -> None:
    """A share that is too little for the bound, or too much for the sampler, is refused."""
    with pytest.raises(PrivacyError, match="a device's noise has a variance of"):
        PrivateEncoding(max_norm=1.0, variance=variance)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.inf, np.nan])
def test_impossible_norm(max_norm: float) -> None:
    """The bound is above zero and finite."""
    with pytest.raises(PrivacyError, match="max_norm is"):
        PrivateEncoding(max_norm=max_norm)


def test_plan_that_is_not_private_is_refused() -> None:
    """A device neither weighs more than others nor clips coordinates below the length."""
    update = update_of(1.0, 5)
    encoding = PrivateEncoding(max_norm=MAX_NORM)
    with pytest.raises(PrivacyError, match="weigh 100 each"):
        encoding.encode(private_plan(5, max_weight=100), update, 1, os.urandom)
    with pytest.raises(PrivacyError, match="the plan clips at 1 "):
        encoding.encode(private_plan(5, clip=1.0), update, 1, os.urandom)
    with pytest.raises(UpdateError, match="expected float32 of shape"):
        encoding.encode(private_plan(6), update, 1, os.urandom)


def test_nobody_left_to_add_noise() -> None:
    """A cohort of which nobody can be counted on is refused."""
    with pytest.raises(PrivacyError, match="of 3 devices none is counted on"):
        num_noisy(3, expected_dropout=0.4, colluder_share=0.49)


# --- a bound that follows the updates ---


def test_bound_finds_the_quantile() -> None:
    """From far off either way the bound comes to the median length of updates, and stays."""
    lengths = np.random.default_rng(8).lognormal(mean=1.0, sigma=0.5, size=200)
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.2, bit_noise=0.05)
    for start in (0.01, 500.0):
        norm, path = start, []
        for number in range(120):
            share = adaptive.blur(float((lengths <= norm).mean()), seeded_bytes(number))
            norm = adaptive.next_norm(norm, share)
            path.append(norm)
        assert np.mean(path[-40:]) == pytest.approx(np.median(lengths), rel=0.1)


def test_one_step_of_the_bound() -> None:
    """The bound moves by exp(-rate (share - quantile)), and a share is between 0 and 1."""
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.2)
    assert adaptive.next_norm(3.0, 0.75) == pytest.approx(3 * exp(-0.05))
    for share in (1.0, 1.2, 1e9):
        assert adaptive.next_norm(3.0, share) == pytest.approx(3 * exp(-0.1))
    for share in (0.0, -0.3, -1e9):
        assert adaptive.next_norm(3.0, share) == pytest.approx(3 * exp(0.1))


def test_bits_and_updates_together_spend_what_was_asked_for() -> None:
    """The bits' and the updates' spendings add up to that of the noise multiplier."""
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.2)
    updates = Gaussian(noise_multiplier=adaptive.update_noise(1.0, 100))
    bits = Gaussian(noise_multiplier=2 * 0.05 * 100)
    plenty = Budget(epsilon=100.0, delta=1e-5)
    both = Ledger().spend(updates, plenty).spend(bits, plenty)
    alone = Ledger().spend(Gaussian(noise_multiplier=1.0), plenty)
    assert both.epsilon(1e-5) == pytest.approx(alone.epsilon(1e-5), rel=1e-6)
    # With 100 devices and a twentieth of noise on the bits the updates need 0.5 % more noise.
    assert adaptive.update_noise(1.0, 100) == pytest.approx(1.005, abs=1e-3)


def test_bits_that_spend_too_much_are_refused() -> None:
    """Less noise on the bits than all may have leaves nothing for the updates."""
    adaptive = AdaptiveClip(quantile=0.5, learning_rate=0.2)
    with pytest.raises(PrivacyError, match=r"10 devices tells more .*; it takes more than 10 dev"):
        adaptive.update_noise(1.0, 10)
    assert adaptive.update_noise(1.0, 11) > 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantile": 0.0}, "quantile is 0"),
        ({"quantile": 1.0}, "quantile is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"bit_noise": np.inf}, "bit_noise is inf"),
    ],
)
def test_impossible_numbers_of_the_bound(change: dict[str, float], words: str) -> None:
    """Numbers out of their range are told by name."""
    sound = {"quantile": 0.5, "learning_rate": 0.2, "bit_noise": 0.05}
    with pytest.raises(PrivacyError, match=words):
        AdaptiveClip(**(sound | change))
