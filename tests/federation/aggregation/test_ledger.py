"""The privacy ledger: published figures, exact composition, and what is refused."""

import subprocess
import sys
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from minga.federation.aggregation.ledger import (
    Budget,
    Concentrated,
    Gaussian,
    Ledger,
    Mechanism,
    Spent,
)
from minga.federation.errors import BudgetError, PrivacyError

PLENTY = Budget(epsilon=1e6, delta=1e-5)


def after(*mechanisms: Mechanism) -> Ledger:
    """Give a ledger that spent these."""
    ledger = Ledger()
    for mechanism in mechanisms:
        ledger = ledger.spend(mechanism, PLENTY)
    return ledger


def exact_gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Solve theorem 8 of Balle and Wang (ICML 2018) for epsilon."""

    def excess(epsilon: float) -> float:
        half, part = 0.5 / noise_multiplier, epsilon * noise_multiplier
        log_second = epsilon + stats.norm.logcdf(-half - part)
        return stats.norm.cdf(half - part) - np.exp(log_second) - delta

    return optimize.brentq(excess, 0, 1000)


# --- figures ---


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 4.0, 20.0])
def test_gaussian_noise_is_counted_exactly(noise_multiplier: float, delta: float) -> None:
    """One Gaussian sum spends what Balle and Wang's theorem says."""
    epsilon = after(Gaussian(noise_multiplier=noise_multiplier)).epsilon(delta)
    assert epsilon == pytest.approx(exact_gaussian_epsilon(noise_multiplier, delta), rel=1e-4)


def test_published_figure_of_one_gaussian_sum() -> None:
    """The classical bound (Dwork and Roth 2014, theorem A.1) is above the exact figure."""
    # It asks for sqrt(2 log(1.25 / delta)) / epsilon: 9.69 at epsilon 0.5 and delta 1e-5.
    noise_multiplier = sqrt(2 * log(1.25 / 1e-5)) / 0.5
    assert noise_multiplier == pytest.approx(9.69, abs=0.01)
    assert 0.35 < after(Gaussian(noise_multiplier=noise_multiplier)).epsilon(1e-5) < 0.5


def test_a_hundred_sums_are_one_with_a_tenth_of_the_noise() -> None:
    """Gaussian sums compose exactly (Dong, Roth and Su 2022, corollary 3.3)."""
    hundred = after(*[Gaussian(noise_multiplier=10.0)] * 100)
    assert hundred.epsilon(1e-5) == pytest.approx(exact_gaussian_epsilon(1.0, 1e-5), rel=1e-4)
    assert hundred.entries == (Spent(mechanism=Gaussian(noise_multiplier=10.0), times=100),)
    assert Ledger().spend(Gaussian(noise_multiplier=10.0), PLENTY, 100) == hundred


@pytest.mark.parametrize("rho", [0.001, 0.1, 1.0])
def test_concentrated_privacy_is_counted_by_its_published_bound(rho: float) -> None:
    """It is below rho + 2 sqrt(rho log(1 / delta)) (Bun and Steinke 2016, proposition 1.3)."""
    bound = rho + 2 * sqrt(rho * log(1e5))
    epsilon = after(Concentrated(rho=rho)).epsilon(1e-5)
    # Gaussian noise is the best of all that is rho-concentrated.
    assert exact_gaussian_epsilon(1 / sqrt(2 * rho), 1e-5) <= epsilon <= bound
    assert epsilon > 0.7 * bound


def test_kinds_add_up() -> None:
    """Gaussian and concentrated spendings add as concentrated ones do."""
    mixed = after(Gaussian(noise_multiplier=2.0), Concentrated(rho=0.375))
    assert mixed.epsilon(1e-5) == pytest.approx(after(Concentrated(rho=0.5)).epsilon(1e-5))


@settings(max_examples=25)
@given(
    multipliers=st.lists(st.floats(0.5, 50), min_size=1, max_size=6),
    delta=st.floats(1e-9, 1e-3),
)
def test_more_is_never_cheaper(multipliers: list[float], delta: float) -> None:
    """Each mechanism adds to epsilon, in any order, and a smaller delta costs more."""
    ledger, before = Ledger(), 0.0
    for multiplier in multipliers:
        ledger = ledger.spend(Gaussian(noise_multiplier=multiplier), PLENTY)
        assert ledger.epsilon(delta) > before
        before = ledger.epsilon(delta)
    backwards = after(*[Gaussian(noise_multiplier=one) for one in reversed(multipliers)])
    assert backwards.epsilon(delta) == pytest.approx(before, rel=1e-3)
    assert ledger.epsilon(delta / 10) > before


# --- the budget ---


def test_what_passes_the_budget_is_refused() -> None:
    """Rounds are spent until one would pass the budget; that one spends nothing."""
    budget, round_ = Budget(epsilon=1.0, delta=1e-6), Gaussian(noise_multiplier=20.0)
    ledger, num_spent = Ledger(), 0
    words = r"1 more round would .* epsilon 1\.\d+ at delta 1e-06"
    while Ledger.epsilon(after(*[round_] * (num_spent + 1)), 1e-6) <= 1.0:
        ledger, num_spent = ledger.spend(round_, budget), num_spent + 1
    with pytest.raises(BudgetError, match=words):
        ledger.spend(round_, budget)
    assert num_spent > 10
    assert 0.9 < ledger.epsilon(budget.delta) <= 1.0
    # A cheaper round still fits, and another budget allows more.
    ledger.spend(Gaussian(noise_multiplier=500.0), budget)
    ledger.spend(Gaussian(noise_multiplier=20.0), Budget(epsilon=2.0, delta=1e-6))


def test_nothing_spent_is_nothing() -> None:
    """An empty ledger stands at zero."""
    assert Ledger().epsilon(1e-9) == 0.0


# --- as it is kept ---


@given(
    numbers=st.lists(st.tuples(st.booleans(), st.floats(1e-6, 1e6)), max_size=8),
    repeat=st.integers(1, 3),
)
def test_ledger_comes_back_from_the_disk(numbers: list[tuple[bool, float]], repeat: int) -> None:
    """Written and read again it is the same, every float exactly, and small."""
    entries = tuple(
        Spent(
            mechanism=Gaussian(noise_multiplier=number)
            if is_gaussian
            else Concentrated(rho=number),
            times=repeat,
        )
        for is_gaussian, number in numbers
    )
    ledger = Ledger(entries)
    text = ledger.to_json()
    assert Ledger.from_json(text) == ledger
    assert len(text) <= 2 + 50 * len(entries)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}x",
        "7",
        '[["gaussian", 1.0]]',
        '[["laplace", 1.0, 1]]',
        '[["gaussian", -1.0, 1]]',
        '[["gaussian", NaN, 1]]',
        '[["gaussian", "1", 1]]',
        '[["concentrated", 1.0, 0]]',
        '[["concentrated", 1.0, 1.5]]',
    ],
)
def test_damaged_ledger_is_refused(text: str) -> None:
    """What is no ledger is not taken for an empty one."""
    with pytest.raises(PrivacyError, match="the privacy ledger cannot be read"):
        Ledger.from_json(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Budget(epsilon=0.0, delta=1e-5), "epsilon is 0"),
        (lambda: Budget(epsilon=1.0, delta=0.0), "delta is 0"),
        (lambda: Budget(epsilon=1.0, delta=1.0), "delta is 1"),
        (lambda: Gaussian(noise_multiplier=0.0), "noise_multiplier is 0"),
        (lambda: Concentrated(rho=float("inf")), "rho is inf"),
    ],
)
def test_impossible_numbers(make, words: str) -> None:
    """Numbers out of their range are told by name."""
    with pytest.raises(PrivacyError, match=words):
        make()


def test_accountant_is_loaded_only_when_asked() -> None:
    """Importing the ledger brings neither dp-accounting nor SciPy."""
    code = (
        "import sys, minga.federation.aggregation.ledger, minga.federation.aggregation.privacy;"
        "print([m for m in ('dp_accounting', 'scipy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_missing_accountant_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PrivacyError, match=r"install minga\[cluster\]"):
        Ledger().spend(Gaussian(noise_multiplier=1.0), PLENTY)
