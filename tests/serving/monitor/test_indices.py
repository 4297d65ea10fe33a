"""PSI and shift of counts, and how surprising they are, held against scipy and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minga.inference.monitor.indices import (
    bin_counts,
    mean_ridit,
    ridit_variance,
    shift_of,
    stability_index,
)
from minga.inference.monitor.significance import (
    discoveries,
    more_often,
    stability_null,
    upper_gamma,
)

DECILES = np.array(stats.norm.ppf(np.linspace(0.1, 0.9, 9)))
TENTHS = np.full(10, 0.1)


def test_stability_index_is_the_textbooks():
    """Where no bin is empty, PSI is the sum over bins of difference times log ratio."""
    shares, counts = np.array([0.5, 0.3, 0.2]), np.array([400, 300, 300])
    seen = counts / 1000
    expected = ((seen - shares) * np.log(seen / shares)).sum()
    assert stability_index(shares, counts) == pytest.approx(expected)
    assert stability_index(shares, np.zeros(3, int)) == 0


def test_one_empty_bin_of_a_small_window_is_no_shift():
    """With 50 values in ten bins an empty one is luck; a bin that must be full is not."""
    counts = np.array([0, 5, 5, 5, 5, 6, 6, 6, 6, 6])
    assert stability_index(TENTHS, counts) < 0.3
    assert stability_index(np.array([0.9, 0.1]), np.array([0, 50])) > 2


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, -0.5])
def test_shift_is_in_standard_deviations(shift):
    """A normal column that moved by so many deviations is told to have done so, bins and all."""
    values = np.random.default_rng(1).normal(shift, size=200_000)
    ridit = mean_ridit(TENTHS, bin_counts(DECILES, values))
    assert shift_of(ridit) == pytest.approx(shift, rel=0.04, abs=0.01)


def test_ridits_vary_as_their_formula_says():
    """The variance of a window's mean ridit under no change is the formula's."""
    generator = np.random.default_rng(2)
    shares = np.array([0.6, 0.3, 0.1])
    windows = generator.multinomial(200, shares, 4000)
    means = [mean_ridit(shares, window) for window in windows]
    assert np.mean(means) == pytest.approx(0.5, abs=2e-3)
    assert np.var(means) == pytest.approx(ridit_variance(shares) / 200, rel=0.08)


@given(st.floats(0.05, 300), st.floats(1e-6, 900))
def test_gamma_tail_is_scipys(shape, x):
    """The tail of the gamma law is scipy's, which devices do not have."""
    assert upper_gamma(shape, x) == pytest.approx(stats.gamma.sf(x, shape), rel=1e-7, abs=1e-12)


@given(
    count=st.integers(0, 60),
    others=st.integers(0, 300),
    reference=st.integers(0, 40),
    rest=st.integers(1, 500),
)
def test_counting_test_is_fishers(count, others, reference, rest):
    """More of a kind than usual is judged by Fisher's exact test, as scipy computes it."""
    expected = stats.hypergeom.sf(
        count - 1, count + others + reference + rest, count + reference, count + others
    )
    found = more_often(count, count + others, reference, reference + rest)
    is_more = count * (reference + rest) > reference * (count + others)
    assert found == pytest.approx(expected if is_more else 1.0, rel=1e-6, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_discoveries_are_scipys(p_values):
    """What is discovered at a false discovery rate is what scipy's adjusted p-values say."""
    adjusted = stats.false_discovery_control(p_values)
    chosen = discoveries(np.array(p_values), 0.05)
    clear = np.abs(adjusted - 0.05) > 1e-9
    assert np.array_equal(chosen[clear], (adjusted <= 0.05)[clear])


@pytest.mark.parametrize("num_values", [50, 500, 10_000])
def test_null_of_the_index_holds_its_level(num_values):
    """Of fresh windows without a change a hundredth has a chance under a hundredth, or fewer."""
    generator = np.random.default_rng(3)
    num_reference, repeats = 1000, 4000
    null = stability_null(tuple(TENTHS), num_reference, num_values)
    references = generator.multinomial(num_reference, TENTHS, repeats) / num_reference
    windows = generator.multinomial(num_values, TENTHS, repeats)
    tails = np.array([null.tail(index) for index in stability_index(references, windows)])
    passed = tails < 0.01
    assert passed.mean() <= 0.01 + 3 * math.sqrt(0.01 / repeats)
    assert passed.mean() >= 0.003
    assert null.tail(0.0) == 1


def test_null_of_many_values_is_chi_square():
    """With many values in each bin the drawn law is the known one, scaled by both sizes."""
    num_values, num_reference = 20_000, 50_000
    null = stability_null(tuple(TENTHS), num_reference, num_values)
    known = stats.chi2.ppf(0.95, 9) * (1 / num_values + 1 / num_reference)
    assert null.tail(0.95 * known) > 0.05 > null.tail(1.05 * known)
