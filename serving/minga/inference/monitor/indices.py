"""How far counts in bins are from the reference: the one implementation, for data and for traffic.

PSI, the population stability index, is the symmetrised Kullback-Leibler divergence of the two
histograms (S. Kullback, R. A. Leibler, 1951; the name and its thresholds come from credit scoring:
N. Siddiqi, Credit Risk Scorecards, 2006). By convention 0.1 is noticeable and 0.2 to 0.25 a shift.

The shift is how far the middle has moved, in standard deviations of the reference: the mean ridit
(I. D. J. Bross, How to Use Ridit Analysis, Biometrics 1958) is the probability that a new value is
larger than a reference value, which for normal distributions is the normal integral of shift /
sqrt(2). Like PSI it needs only counts, so outliers cannot blow it up.
"""

import math
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

SMALLEST_SHARE: Final = 1e-4
"""Stands for an empty bin, whose logarithm would be infinite."""

_NORMAL: Final = NormalDist()
_LARGEST_RIDIT: Final = 1 - 1e-9

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def bin_counts(edges: Floats, values: NDArray[np.float64]) -> Counts:
    """Count values, shape `(n,)`, by bins, missing ones aside.

    Args:
        edges: inner edges, rising; a value on an edge belongs to the bin above it.
        values: infinite ones count as missing.

    Returns:
        One count more than there are edges.
    """
    present = values[np.isfinite(values)]
    return np.bincount(np.searchsorted(edges, present, side="right"), minlength=len(edges) + 1)


def stability_index(shares: Floats, counts: NDArray[np.integer]) -> Floats:
    """Give the PSI of counts against reference shares; 0 where all counts are 0.

    An empty bin stands for half a value, or for its reference share where that is less: with a
    fixed tiny share one bin that happens to be empty in a small window would be a shift.

    Args:
        shares: of the reference, shape `(..., bins)`.
        counts: shape `(..., bins)`.

    Returns:
        Shape `(...)`.
    """
    total = counts.sum(axis=-1, keepdims=True)
    num_values = np.maximum(total, 1)
    expected = np.maximum(shares, SMALLEST_SHARE)
    least = np.minimum(expected, np.maximum(0.5 / num_values, SMALLEST_SHARE))
    seen = np.where(counts > 0, np.maximum(counts / num_values, SMALLEST_SHARE), least)
    index = ((seen - expected) * np.log(seen / expected)).sum(axis=-1)
    return np.where(total[..., 0] > 0, index, 0.0)


def mean_ridit(shares: Floats, counts: Counts) -> float:
    """Give the probability that a counted value is above a reference value, ties shared out.

    Args:
        shares: of the reference, shape `(bins,)`.
        counts: shape `(bins,)`, of at least one value.
    """
    ridits = np.cumsum(shares) - shares / 2
    return float(counts @ ridits / counts.sum())


def ridit_variance(shares: Floats) -> float:
    """Give the variance of one value's ridit if nothing has changed; below 1/12 through ties."""
    return float(max(1 - (shares**3).sum(), 0.0) / 12)


def shift_of(ridit: float) -> float:
    """Give the shift in standard deviations that a mean ridit means for normal distributions."""
    bounded = min(max(ridit, 1 - _LARGEST_RIDIT), _LARGEST_RIDIT)
    return math.sqrt(2) * _NORMAL.inv_cdf(bounded)
