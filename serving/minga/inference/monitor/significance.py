"""How surprising a window is if nothing has changed.

The law of PSI without a change is known only for many values in every bin, where it is chi-square
(B. Yurdakul, Statistical Properties of Population Stability Index, 2018). Windows of 50 rows and
rare categories are far from that, so the law is drawn here: window and reference both from the
reference's shares, in their sizes. Beyond the draws its tail is that of the gamma law of the same
mean and variance, or the share of draws that reached so far where that is more.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from minga.inference.monitor.indices import Floats, stability_index

NUM_DRAWS: Final = 2000
_TINY: Final = 1e-300
_PRECISION: Final = 1e-12
_MAX_TERMS: Final = 10_000
_STEPS: Final = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
_LEAST_SKEWNESS: Final = 0.05


@dataclass(frozen=True, slots=True)
class StabilityNull:
    """The law of PSI for windows of one size while nothing changes.

    Attributes:
        draws: PSIs as they come by luck, sorted.
        shape: of the gamma law of the same mean and variance.
        scale: of that law.
    """

    draws: Floats
    shape: float
    scale: float

    def tail(self, index: float) -> float:
        """Give the probability of a PSI of this much or more."""
        share = 1 - float(np.searchsorted(self.draws, index)) / len(self.draws)
        if not self.shape:
            return share
        return max(share, upper_gamma(self.shape, index / self.scale))


@dataclass(frozen=True, slots=True)
class LossNull:
    """The law of a measure's loss while nothing changes.

    Attributes:
        draws: losses as they come by luck, sorted.
        mean: of them.
        deviation: of them.
        skewness: of them; 0 if they lean to the harmless side.
    """

    draws: Floats
    mean: float
    deviation: float
    skewness: float

    @classmethod
    def of(cls, draws: Floats) -> Self:
        """Describe draws, shape `(n,)`, of at least one loss."""
        mean, deviation = float(draws.mean()), float(draws.std())
        if deviation == 0:
            return cls(np.sort(draws), mean, 0.0, 0.0)
        skewness = float((((draws - mean) / deviation) ** 3).mean())
        return cls(np.sort(draws), mean, deviation, max(skewness, 0.0))

    def tail(self, loss: float) -> float:
        """Give the probability of a loss of this much or more.

        Beyond the draws it is Pearson's law of type III, the gamma law of the same mean, variance
        and skewness (K. Pearson, 1895): measures of few rows lean to the bad side.
        """
        share = 1 - float(np.searchsorted(self.draws, loss)) / len(self.draws)
        if not self.deviation:
            return share
        z = (loss - self.mean) / self.deviation
        if self.skewness < _LEAST_SKEWNESS:
            return max(share, upper_normal(z))
        shape = 4 / self.skewness**2
        return max(share, upper_gamma(shape, shape + z * math.sqrt(shape)))


def stability_null(shares: tuple[float, ...], num_reference: int, num_values: int) -> StabilityNull:
    """Give the law of PSI; the same arguments give the same law.

    Drawing it takes milliseconds, so columns and windows that are nearly alike share one: shares
    count in rounded form, without their order, and sizes by `usual_size`.

    Args:
        shares: of the reference's bins.
        num_reference: how many values these come from.
        num_values: of the window.
    """
    rounded = tuple(sorted(_rounded(share) for share in shares))
    return _drawn(rounded, usual_size(num_reference), usual_size(num_values))


def _rounded(share: float) -> float:
    return round(share, 2) if share >= 0.05 else float(f"{share:.1g}")


@lru_cache(maxsize=4096)
def _drawn(shares: tuple[float, ...], num_reference: int, num_values: int) -> StabilityNull:
    generator = np.random.default_rng(20261123)
    law = np.asarray(shares) / sum(shares)
    references = generator.multinomial(num_reference, law, NUM_DRAWS) / num_reference
    windows = generator.multinomial(num_values, law, NUM_DRAWS)
    draws = np.sort(stability_index(references, windows))
    mean, variance = float(draws.mean()), float(draws.var())
    if variance == 0:
        return StabilityNull(draws, 0.0, 1.0)
    return StabilityNull(draws, mean**2 / variance, variance / mean)


def usual_size(number: int) -> int:
    """Round a size down to one of ten in each decade; smaller samples vary more, never less."""
    unit: int = 10 ** max(len(str(number)) - 2, 0)
    return max((unit * step for step in _STEPS if unit * step <= number), default=number)


def upper_gamma(shape: float, x: float) -> float:
    """Give the regularised upper incomplete gamma function Q(shape, x), the tail of a gamma law.

    By its series below the mean and by Lentz's continued fraction above (W. H. Press et al.,
    Numerical Recipes, 3rd edition 2007, section 6.2). scipy has it; devices have no scipy.
    """
    if x <= 0:
        return 1.0
    front = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1 / shape
        for count in range(1, _MAX_TERMS):
            term *= x / (shape + count)
            total += term
            if term < total * _PRECISION:
                break
        return max(1 - front * total, 0.0)
    b = x + 1 - shape
    c, d = 1 / _TINY, 1 / b
    fraction = d
    for count in range(1, _MAX_TERMS):
        a = -count * (count - shape)
        b += 2
        d = 1 / _away_from_zero(a * d + b)
        c = _away_from_zero(b + a / c)
        fraction *= d * c
        if abs(d * c - 1) < _PRECISION:
            break
    return front * fraction


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def two_sided(z: float) -> float:
    """Give the probability that a standard normal value is as far from 0 as `z`."""
    return math.erfc(abs(z) / math.sqrt(2))


def upper_normal(z: float) -> float:
    """Give the probability that a standard normal value is above `z`."""
    return math.erfc(z / math.sqrt(2)) / 2


def more_often(count: int, num_values: int, reference: int, num_reference: int) -> float:
    """Give the probability of so many by luck, if as many were usual as in the reference.

    Fisher's exact test, one-sided (R. A. Fisher, 1922): the tail of the hypergeometric law.

    Args:
        count: how many of the window's values are of the kind.
        num_values: of the window.
        reference: how many of the reference's values are.
        num_reference: of the reference.
    """
    marked, total = count + reference, num_values + num_reference
    if count * total <= num_values * marked:
        return 1.0  # not more than usual; where the tail begins does not matter
    term = math.exp(
        _log_choose(marked, count)
        + _log_choose(total - marked, num_values - count)
        - _log_choose(total, num_values)
    )
    tail = term
    for k in range(count, min(marked, num_values)):
        term *= (marked - k) * (num_values - k)
        term /= (k + 1) * (total - marked - num_values + k + 1)
        tail += term
        if term <= tail * _PRECISION:
            break
    return min(tail, 1.0)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def discoveries(p_values: NDArray[np.float64], level: float) -> NDArray[np.bool_]:
    """Say which of many hypotheses to give up, so that few of those are true.

    The procedure of Y. Benjamini and Y. Hochberg (Controlling the False Discovery Rate, JRSS B
    1995): the expected share of false ones among the discoveries is at most `level`, and if all
    hypotheses are true that is the probability of any discovery.
    """
    order = np.argsort(p_values)
    bounds = level * np.arange(1, len(p_values) + 1) / max(len(p_values), 1)
    passing = np.flatnonzero(p_values[order] <= bounds)
    chosen = np.zeros(len(p_values), bool)
    if len(passing):
        chosen[order[: passing[-1] + 1]] = True
    return chosen
