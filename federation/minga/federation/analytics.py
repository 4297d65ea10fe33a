"""Federated analytics: statistics of columns of data that stays on its devices.

All of it is made of means over rows, which add up under secure aggregation: of each column's values
and their squares, of whether a row has a value, and of whether that lies in a bin. A device sends
its own means, weighted by its rows; the coordinator learns the mean over all rows.

A quantile is found by histograms that get finer: each round asks for bins within the bin of the
round before, so after `QUANTILE_ROUNDS` rounds it is known to within `BINS ** -QUANTILE_ROUNDS` of
the column's range.

What is asked next is a function of the query and of the answers so far. Pure: no I/O, no clock.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.errors import PeerError
from minga.federation.limits import (
    MAX_METRIC_NAME_CHARS,
    MAX_QUERY_COLUMNS,
    MAX_QUERY_EDGES,
    MAX_QUERY_VALUES,
)
from minga.federation.secagg.encoding import encode

BINS: Final = 64
"""Bins of one step towards a quantile."""

QUANTILE_ROUNDS: Final = 3

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one round asks of one column.

    In the vector: the share of rows that have a value; the means, over all rows, of that value
    scaled to [0, 1] and of its square, 0 where there is none; then the share of rows below the
    first edge, in each bin, and from the last edge on.

    Raises:
        PeerError: names, bounds or edges cannot work.
    """

    column: str
    low: float
    high: float
    """Values are clipped to [low, high]."""
    edges: tuple[float, ...] = ()
    """Bins reach from one edge up to, but without, the next."""

    def __post_init__(self) -> None:
        if not 0 < len(self.column) <= MAX_METRIC_NAME_CHARS or not self.column.isprintable():
            raise PeerError(f"names of columns are printable, up to {MAX_METRIC_NAME_CHARS} long")
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise PeerError(f"column {self.column!r} has bounds {self.low} and {self.high}")
        if len(self.edges) > MAX_QUERY_EDGES or not all(isfinite(edge) for edge in self.edges):
            raise PeerError(f"a histogram has up to {MAX_QUERY_EDGES} finite edges")
        if any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise PeerError(f"the edges of column {self.column!r} do not rise")

    @property
    def num_values(self) -> int:
        """Length of its stretch of the vector."""
        return 3 + (len(self.edges) + 1 if self.edges else 0)

    def answer(self, values: NDArray[np.float64]) -> Vector:
        """Give one device's means, shape `(num_values,)`.

        Args:
            values: of this column, one for each row, shape `(n,)` with n above 0; NaN is no value.
        """
        has = ~np.isnan(values)
        clipped = np.clip(np.where(has, values, self.low), self.low, self.high)
        scaled = np.where(has, (clipped - self.low) / (self.high - self.low), 0.0)
        means = [has.mean(), scaled.mean(), np.square(scaled).mean()]
        if self.edges:
            bins = np.searchsorted(self.edges, values[has], side="right")
            counts = np.bincount(bins, minlength=len(self.edges) + 1)
            means += list(counts / len(values))
        return np.array(means, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one round asks; it is a kind of a round's work, see `minga.federation.work`.

    Raises:
        PeerError: it asks nothing, or too much.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.parts) <= MAX_QUERY_COLUMNS:
            raise PeerError(f"a question has 1 to {MAX_QUERY_COLUMNS} parts")
        if self.num_values() > MAX_QUERY_VALUES:
            raise PeerError(f"a question has up to {MAX_QUERY_VALUES} values; ask for fewer bins")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it is about, sorted."""
        return tuple(sorted({part.column for part in self.parts}))

    def num_values(self, model_values: int = 0) -> int:  # noqa: ARG002 - as in other work
        """Length of a device's vector."""
        return sum(part.num_values for part in self.parts)

    def subject(self, model_digest: bytes) -> bytes:
        """Give what a secure round's plan binds beside the training's parameters."""
        fields: list[str | int | float] = []
        for part in self.parts:
            fields += [part.column, float(part.low), float(part.high), len(part.edges)]
            fields += map(float, part.edges)
        return sha256(encode("question", model_digest, *fields)).digest()

    def answer(self, columns: Mapping[str, NDArray[np.float64]]) -> tuple[Vector, int]:
        """Give one device's vector, and over how many rows.

        Raises:
            PeerError: a column is missing, or they have different lengths, or no rows.
        """
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise PeerError(f"there is no column {missing[0]!r}")
        lengths = {len(columns[name]) for name in self.columns}
        if len(lengths) != 1 or not (num_rows := lengths.pop()):
            raise PeerError("the columns have no rows, or not equally many")
        vectors = [part.answer(np.asarray(columns[part.column], np.float64)) for part in self.parts]
        return np.concatenate(vectors), num_rows

    def split(self, mean: Sequence[float]) -> Iterator[tuple[Part, NDArray[np.float64]]]:
        """Give each part with its stretch of the mean over all devices."""
        values, start = np.asarray(mean, np.float64), 0
        for part in self.parts:
            yield part, values[start : start + part.num_values]
            start += part.num_values


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnQuery:
    """What is to be found out of one column.

    Raises:
        PeerError: it cannot be.
    """

    column: str
    low: float
    high: float
    edges: tuple[float, ...] = ()
    """Of the histogram; none without it."""
    quantiles: tuple[float, ...] = ()
    """Each from 0 to 1."""

    def __post_init__(self) -> None:
        self.first_part()
        if len(self.quantiles) > MAX_QUERY_EDGES or not all(0 <= q <= 1 for q in self.quantiles):
            raise PeerError(f"quantiles are from 0 to 1, got {self.quantiles}")

    def first_part(self) -> Part:
        """Give what the first round asks of this column: moments and the histogram."""
        return Part(column=self.column, low=self.low, high=self.high, edges=self.edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnStatistics:
    """What was found out of one column."""

    column: str
    share_present: float
    """Of all rows, those that have a value."""
    mean: float
    variance: float
    """Of the population: the mean squared distance from the mean."""
    histogram: tuple[float, ...]
    """Shares of the rows with a value: below the first edge, in each bin, from the last edge on."""
    quantiles: Mapping[float, float]
    """In the middle of the last bin; off by at most half of its width, plus rounding."""


Answers = Sequence[Sequence[float]]
"""The mean vector of each round so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """All that is to be found out.

    Raises:
        PeerError: it asks nothing, too much, or the same column twice.
    """

    columns: tuple[ColumnQuery, ...]

    def __post_init__(self) -> None:
        names = [column.column for column in self.columns]
        if len(set(names)) != len(names):
            raise PeerError("a query names each column once")
        self._first()
        if self.num_rounds > 1:
            self._finer(self._brackets([]))  # not too many

    @property
    def num_rounds(self) -> int:
        """How many rounds it takes."""
        has_quantiles = any(column.quantiles for column in self.columns)
        return 1 + (QUANTILE_ROUNDS if has_quantiles else 0)

    def next_question(self, answers: Answers) -> Question | None:
        """Say what the next round asks; None when all is known."""
        if not answers:
            return self._first()
        if len(answers) >= self.num_rounds:
            return None
        return self._finer(self._brackets(answers))

    def statistics(self, answers: Answers) -> tuple[ColumnStatistics, ...]:
        """Say what was found out, when all rounds have been answered."""
        firsts = dict(zip(self.columns, self._first().split(answers[0]), strict=True))
        brackets = self._brackets(answers)
        found = []
        for query, (part, values) in firsts.items():
            quantiles = {q: sum(brackets[query.column, q]) / 2 for q in query.quantiles}
            found.append(_statistics(part, values, quantiles))
        return tuple(found)

    def _first(self) -> Question:
        return Question(parts=tuple(column.first_part() for column in self.columns))

    def _wanted(self) -> list[tuple[ColumnQuery, float]]:
        return [(query, q) for query in self.columns for q in query.quantiles]

    def _finer(self, brackets: Mapping[tuple[str, float], tuple[float, float]]) -> Question:
        """Ask for bins where each quantile is known to be."""
        return Question(
            parts=tuple(
                Part(
                    column=query.column,
                    low=query.low,
                    high=query.high,
                    edges=_edges(brackets[query.column, q]),
                )
                for query, q in self._wanted()
            )
        )

    def _brackets(self, answers: Answers) -> dict[tuple[str, float], tuple[float, float]]:
        """Say between which values each quantile is, by the answers so far."""
        brackets = {(query.column, q): (query.low, query.high) for query, q in self._wanted()}
        for answer in answers[1:]:
            stretches = self._finer(brackets).split(answer)
            for (query, q), (part, values) in zip(self._wanted(), stretches, strict=True):
                brackets[query.column, q] = _bin_of(part, values, q)
        return brackets


def _edges(bracket: tuple[float, float]) -> tuple[float, ...]:
    edges = np.linspace(*bracket, BINS + 1)
    return tuple(float(edge) for edge in np.unique(edges))  # equal ones where floats are used up


def _bin_of(part: Part, values: NDArray[np.float64], quantile: float) -> tuple[float, float]:
    """Give the bin in which the share of rows up to a value reaches a quantile."""
    below = np.cumsum(values[3:-1])  # up to each edge
    reached = np.flatnonzero(below[1:] >= quantile * values[0] - _ROUNDING)
    index = int(reached[0]) if len(reached) else len(part.edges) - 2
    return part.edges[index], part.edges[index + 1]


_ROUNDING: Final = 1e-6
"""Shares are rounded to 24 bits on each device and to float32 in the mean."""


def _statistics(
    part: Part, values: NDArray[np.float64], quantiles: Mapping[float, float]
) -> ColumnStatistics:
    present, first, second = values[:3]
    width, share = part.high - part.low, max(present, np.finfo(np.float64).tiny)
    mean = first / share
    return ColumnStatistics(
        column=part.column,
        share_present=float(present),
        mean=float(part.low + width * mean),
        variance=float(max(0.0, second / share - mean**2) * width**2),
        histogram=tuple(float(value / share) for value in values[3:]),
        quantiles=quantiles,
    )
