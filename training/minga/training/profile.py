"""The reference profile: the statistics of the training data that drift is measured against.

Drift is the population stability index (PSI) over ten quantile bins, or over the categories of
a categorical column. By the usual convention 0.1 is noticeable and 0.25 is a shift.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.document import Document
from minga.training.schema import MAX_CATEGORIES, iterate_columns

NUM_BINS = 10

SMALLEST_SHARE = 1e-4
"""Stands for an empty bin, whose logarithm would be infinite."""


class ColumnProfile(Document):
    """The distribution of one column, missing values aside."""

    name: str
    edges: tuple[float, ...]
    """Inner edges of the bins, rising; a value on an edge belongs to the bin above it."""
    shares: tuple[float, ...]
    """Share of the values in each bin: one more than there are edges."""
    mean: float
    deviation: float
    missing: float


class Profile(Document):
    """The distributions of inputs, targets and, once a model is trained, its outputs."""

    num_examples: int
    inputs: tuple[ColumnProfile, ...]
    targets: tuple[ColumnProfile, ...]
    outputs: tuple[ColumnProfile, ...] = ()


def profile_columns(array: NDArray[Any], names: Sequence[str] = ()) -> tuple[ColumnProfile, ...]:
    """Profile an array of shape `(n, ...)` column by column."""
    table = array[:, None] if array.ndim == 1 else array
    return tuple(_profile(name, values) for name, values in iterate_columns(table, names))


def stability_index(reference: ColumnProfile, values: NDArray[np.float64]) -> float:
    """Give the PSI of values, shape `(n,)`, against a profiled column; 0 if none is present."""
    present = values[np.isfinite(values)]
    if len(present) == 0:
        return 0.0
    expected = np.maximum(reference.shares, SMALLEST_SHARE)
    seen = np.maximum(_shares(present, np.asarray(reference.edges)), SMALLEST_SHARE)
    return float(np.sum((seen - expected) * np.log(seen / expected)))


def _profile(name: str, values: NDArray[np.float64]) -> ColumnProfile:
    present = values[np.isfinite(values)]
    edges = _edges(present)
    return ColumnProfile(
        name=name,
        edges=tuple(map(float, edges)),
        shares=tuple(map(float, _shares(present, edges))),
        mean=float(present.mean()) if len(present) else 0.0,
        deviation=float(present.std()) if len(present) else 0.0,
        missing=1 - len(present) / len(values) if len(values) else 0.0,
    )


def _edges(present: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cut between the values if they are few, else at the quantiles."""
    distinct = np.unique(present)
    if len(distinct) <= MAX_CATEGORIES:
        return (distinct[1:] + distinct[:-1]) / 2
    return np.unique(np.quantile(present, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))


def _shares(present: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.bincount(np.searchsorted(edges, present, side="right"), minlength=len(edges) + 1)
    return counts / max(len(present), 1)
