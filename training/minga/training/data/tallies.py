"""What a column's values come to against its description, chunk by chunk."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.profile import ColumnProfile, bin_counts, stability_index_of
from minga.training.schema import Column, iterate_columns
from minga.training.stored import chunks_of

KEPT_UNKNOWN = 100
"""How many different unknown categories are remembered."""

# Arbitrary odd numbers: what matters is that words at different places are mixed differently.
_MIXERS = np.random.default_rng(20260923).integers(1, 2**63, 1 << 16, np.uint64) * 2 + 1


class Tally:
    """Counts of one column.

    Attributes:
        column: what its values should be.
        unknown: some of the values that are none of the categories, sorted.
    """

    def __init__(self, column: Column, reference: ColumnProfile | None) -> None:
        self.column = column
        self.unknown = np.empty(0)
        self.low, self.high = np.inf, -np.inf
        self.num_values = self.num_present = 0
        self.num_unknown = self.num_outside = self.num_fractions = self.num_repeated = 0
        self._reference = reference
        self._counts = np.zeros(len(reference.shares) if reference else 0, np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        """Count more values, shape `(n,)`."""
        present = values[np.isfinite(values)]
        self.num_values += len(values)
        self.num_present += len(present)
        if self._reference is not None:
            self._counts += bin_counts(self._reference, values)
        if not len(present):
            return
        self.low = min(self.low, float(present.min()))
        self.high = max(self.high, float(present.max()))
        if self.column.kind == "category":
            unknown = present[~np.isin(present, self.column.categories)]
            self.num_unknown += len(unknown)
            self.unknown = np.union1d(self.unknown, unknown)[:KEPT_UNKNOWN]
            return
        column = self.column
        self.num_outside += int(((present < column.low) | (present > column.high)).sum())
        if column.whole:
            self.num_fractions += int((present != np.round(present)).sum())
        if column.unique:
            self.num_repeated += len(present) - len(np.unique(present))

    @property
    def drift(self) -> float:
        """The population stability index against the reference; 0 without one."""
        if self._reference is None:
            return 0.0
        return stability_index_of(self._reference, self._counts)


def tally_columns(
    array: NDArray[Any], columns: Sequence[Column], references: Mapping[str, ColumnProfile]
) -> tuple[Tally, ...]:
    """Count an array of shape `(n, ...)` against its columns' descriptions and profiles."""
    tallies = tuple(Tally(column, references.get(column.name)) for column in columns)
    names = tuple(column.name for column in columns)
    for chunk in chunks_of(array):
        for tally, (_, values) in zip(tallies, iterate_columns(chunk, names), strict=True):
            tally.add(values)
    return tallies


def row_digests(array: NDArray[Any]) -> NDArray[np.uint64]:
    """Name each row by 64 bits of its bytes, so that equal rows are found fast.

    Words are mixed one by one (Steele, Lea, Flood, OOPSLA 2014) before they are summed. No defence
    against rows that are made to collide.
    """
    return np.concatenate([_digests(chunk) for chunk in chunks_of(array)])


def _digests(rows: NDArray[Any]) -> NDArray[np.uint64]:
    num_rows = len(rows)
    plain = np.ascontiguousarray(rows).reshape(num_rows, -1).view(np.uint8)
    padding = -plain.shape[1] % 8
    if padding:
        plain = np.pad(plain, ((0, 0), (0, padding)))
    words = plain.view(np.uint64)
    digests = np.zeros(num_rows, np.uint64)
    for place in range(words.shape[1]):
        word = words[:, place] + np.uint64(place)
        word ^= word >> np.uint64(33)
        word *= _MIXERS[place % len(_MIXERS)]
        word ^= word >> np.uint64(29)
        digests = digests * np.uint64(0x9E3779B97F4A7C15) + word
    return digests
