"""The geometric median of vectors, of which only the inner products are known.

Weiszfeld's iteration (Tohoku Math. J. 43, 1937) as completed by Vardi and Zhang (PNAS 97(4), 2000),
which neither divides by zero nor stops at a vector that is not the median. It starts at the vector
with the smallest sum of distances, which is no liar's far away one. Pillutla et al. (2022) start at
the mean and add a small constant to distances: that finds about the same point, but slowly where a
few vectors are very far away.

A point is kept as its coefficients: all iterates are means of the vectors.
"""

from math import sqrt
from typing import Final

import numpy as np

from minga.federation.aggregation.contributions import Wide

MAX_STEPS: Final = 1000

TOLERANCE: Final = 1e-9
"""The iteration ends when a step is shorter than this share of the median distance."""

_SAME: Final = 1e-14
"""Squared distances below this share of the squared lengths are rounding: the points are one."""


def geometric_median(products: Wide) -> Wide:
    """Find the point with the smallest sum of distances to some vectors.

    Args:
        products: their inner products, shape `(n, n)`.

    Returns:
        The coefficients of the vectors in that point, shape `(n,)`, from 0 on, with a sum of 1.
        Where it is not unique (an even number of vectors on one line), one of them.
    """
    squares = np.diagonal(products)
    between = _distances(squares[:, None] + squares - 2.0 * products, squares[:, None] + squares)
    point = np.zeros(len(products))
    point[between.sum(axis=1).argmin()] = 1.0
    for _ in range(MAX_STEPS):
        distances = _distances_to(products, point)
        there = distances == 0.0
        if there.all():
            break
        pull = np.divide(1.0, distances, out=np.zeros_like(distances), where=~there)
        target = pull / pull.sum()
        if there.any():
            # How strongly the others pull, against the vectors that are at the point already.
            force = pull.sum() * _length(products, target - point)
            target += min(1.0, there.sum() / force if force > 0.0 else 1.0) * (point - target)
        step = _length(products, target - point)
        point = target
        if step <= TOLERANCE * np.median(distances):
            break
    return point


def _distances_to(products: Wide, point: Wide) -> Wide:
    """Give the distance of each vector from a point."""
    across = products @ point
    return _distances(
        np.diagonal(products) - 2.0 * across + point @ across,
        np.diagonal(products) + point @ across,
    )


def _distances(squared: Wide, scale: Wide) -> Wide:
    """Take the roots, and zero for what is rounding."""
    return np.sqrt(np.where(squared > _SAME * scale, squared, 0.0))


def _length(products: Wide, coefficients: Wide) -> float:
    return sqrt(max(0.0, float(coefficients @ products @ coefficients)))
