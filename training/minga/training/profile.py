"""The reference profile: the statistics of the training data that drift is measured against.

Drift is the population stability index (PSI) over ten quantile bins, or over the categories of
a categorical column. By the usual convention 0.1 is noticeable and 0.25 is a shift. It is computed
where traffic is watched too, in `minga.inference.monitor.indices`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.inference.monitor import indices
from minga.training.document import Document
from minga.training.schema import MAX_CATEGORIES, iterate_columns
from minga.training.stored import chunks_of, sample_of

NUM_BINS = 10


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
    """Profile an array of shape `(n, ...)` column by column.

    The bins of an array that stays on the disk are cut by a sample; all else is of all its rows.
    """
    if array.ndim == 1:
        array = array[:][:, None]
    columns = {
        name: _Distribution(name, values[np.isfinite(values)])
        for name, values in iterate_columns(sample_of(array), names)
    }
    for chunk in chunks_of(array):
        for name, values in iterate_columns(chunk, names):
            columns[name].add(values)
    return tuple(column.profile() for column in columns.values())


def stability_index(reference: ColumnProfile, values: NDArray[np.float64]) -> float:
    """Give the PSI of values, shape `(n,)`, against a profiled column; 0 if none is present."""
    return stability_index_of(reference, bin_counts(reference, values))


def stability_index_of(reference: ColumnProfile, counts: NDArray[np.int64]) -> float:
    """Give the PSI of counts by the bins of a profiled column; 0 if all are 0."""
    return float(indices.stability_index(np.asarray(reference.shares), counts))


def bin_counts(reference: ColumnProfile, values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count values, shape `(n,)`, by the bins of a profiled column, missing ones aside."""
    return indices.bin_counts(np.asarray(reference.edges), values)


class _Distribution:
    """What a column's values come to, chunk by chunk; a sample says where to cut it."""

    def __init__(self, name: str, sample: NDArray[np.float64]) -> None:
        self._name = name
        self._edges = _edges(sample)
        self._centre = float(sample.mean()) if len(sample) else 0.0
        self._counts = np.zeros(len(self._edges) + 1, np.int64)
        self._num_values = 0
        self._sum = self._sum_of_squares = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        present = values[np.isfinite(values)]
        self._counts += indices.bin_counts(self._edges, present)
        self._num_values += len(values)
        self._sum += float((present - self._centre).sum())
        self._sum_of_squares += float(((present - self._centre) ** 2).sum())

    def profile(self) -> ColumnProfile:
        num_present = int(self._counts.sum())
        offset = self._sum / max(num_present, 1)
        variance = max(self._sum_of_squares / max(num_present, 1) - offset**2, 0.0)
        return ColumnProfile(
            name=self._name,
            edges=tuple(map(float, self._edges)),
            shares=tuple(map(float, self._counts / max(num_present, 1))),
            mean=self._centre + offset,
            deviation=float(np.sqrt(variance)),
            missing=1 - num_present / self._num_values if self._num_values else 0.0,
        )


def _edges(present: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cut between the values if they are few, else at the quantiles."""
    distinct = np.unique(present)
    if len(distinct) <= MAX_CATEGORIES:
        return (distinct[1:] + distinct[:-1]) / 2
    return np.unique(np.quantile(present, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
