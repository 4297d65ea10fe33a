"""Noise: the right distributions, from the right number of random bytes."""

import hashlib
import os
from math import exp

import numpy as np
import pytest
from scipy import stats

from minga.federation.aggregation.noise import (
    MAX_VARIANCE,
    DiscreteNoise,
    add_gaussian,
    draw_gaussian,
)
from minga.federation.errors import PrivacyError
from minga.federation.memory import BLOCK_VALUES


def seeded(seed: int):
    """Give a source of the same bytes each time."""

    def random_bytes(num: int) -> bytes:
        return hashlib.shake_128(str(seed).encode()).digest(num)

    return random_bytes


@pytest.mark.parametrize("variance", [1, 4, 7, 100])
def test_integers_have_the_discrete_gaussians_probabilities(variance: int) -> None:
    """Counts of 150,000 draws fit exp(-k² / (2 variance)) by a chi-squared test."""
    num = 150_000
    drawn = DiscreteNoise(variance, seeded(variance)).draw(num)
    reach = int(3.5 * variance**0.5) + 1
    support = np.arange(-50 * reach, 50 * reach + 1)
    density = np.exp(-(support.astype(float) ** 2) / (2 * variance))
    density /= density.sum()
    inner = np.abs(support) <= reach
    expected = np.append(density[inner], density[~inner].sum()) * num
    counts = np.array([np.sum(drawn == k) for k in support[inner]])
    counts = np.append(counts, num - counts.sum())
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("variance", [MAX_VARIANCE, 123_457])
def test_wide_integers_are_nearly_gaussian(variance: int) -> None:
    """With many levels the discrete Gaussian is the Gaussian, by a Kolmogorov-Smirnov test."""
    drawn = DiscreteNoise(variance, seeded(1)).draw(100_000)
    assert stats.kstest(drawn / variance**0.5, "norm").pvalue > 1e-4
    assert abs(drawn.var() / variance - 1) < 0.02


def test_events_have_the_probabilities_asked_for() -> None:
    """exp(-numerator / denominator) is met, below and above one, also where both are large."""
    noise = DiscreteNoise(4, seeded(2))
    num = 40_000
    for numerator, denominator in [(0, 1), (1, 3), (5, 5), (12, 5), (3 << 57, 1 << 58)]:
        yes = noise._keep(np.full(num, numerator, np.uint64), denominator).mean()
        p = exp(-numerator / denominator)
        assert abs(yes - p) <= 5 * (p * (1 - p) / num) ** 0.5


def test_uniform_integers_favour_nobody() -> None:
    """Remainders of 64 bits are uniform, also below a limit that cuts most words off."""
    bits = DiscreteNoise(4, seeded(3))._bits
    small = np.bincount(bits.below(7, 70_000).astype(np.int64), minlength=7)
    assert stats.chisquare(small).pvalue > 1e-4
    limit = (1 << 63) + 1  # half of all words are drawn again
    large = bits.below(limit, 20_000)
    assert int(large.max()) < limit
    assert stats.kstest(large.astype(float) / limit, "uniform").pvalue > 1e-4


def test_gaussian_noise_is_gaussian() -> None:
    """Added noise has mean 0, the standard deviation asked for, and the right shape."""
    values = np.full(2 * BLOCK_VALUES + 1001, 5.0, np.float32)
    add_gaussian(values, 3.0, seeded(4))
    assert stats.kstest((values - 5.0) / 3.0, "norm").pvalue > 1e-4
    halves = np.corrcoef(values[: BLOCK_VALUES // 2], values[BLOCK_VALUES // 2 : BLOCK_VALUES])
    assert abs(halves[0, 1]) < 0.03


def test_no_noise_changes_nothing() -> None:
    """A standard deviation of zero leaves every bit."""
    values = np.arange(10, dtype=np.float32)
    add_gaussian(values, 0.0, seeded(5))
    np.testing.assert_array_equal(values, np.arange(10))


def test_noise_comes_from_the_bytes_alone() -> None:
    """The same key gives the same noise; another key another one."""
    one, same = (DiscreteNoise(50, seeded(6)).draw(100) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert (DiscreteNoise(50, seeded(7)).draw(100) != one).any()
    assert draw_gaussian(1.0, seeded(6)) == draw_gaussian(1.0, seeded(6))
    assert draw_gaussian(1.0, os.urandom) != draw_gaussian(1.0, os.urandom)


@pytest.mark.parametrize("variance", [0, -1, MAX_VARIANCE + 1])
def test_impossible_variance(variance: int) -> None:
    """A variance whose integers would not fit in 64 bits is refused."""
    with pytest.raises(PrivacyError, match="the noise's variance is"):
        DiscreteNoise(variance, os.urandom)
