"""Counts of a model's traffic by the reference's bins. Sketches add up exactly, in any order.

All counts are integers and the bins are fixed by the reference, so the sum of the sketches of any
parts of the traffic, from whatever replicas, is the sketch of the whole. Memory depends on the
number of bins, not of requests.

Of a table each cell counts. Of what is no table (images, `Role.INPUT` with the one column
`values`) each row gives one value, from a place that its own bytes choose: the cells of one image
are no independent draws, and counting them as such would make every window significant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from minga.inference.monitor.indices import Counts, Floats, bin_counts
from minga.inference.monitor.losses import LossTree
from minga.inference.monitor.reference import MAX_COLUMNS, AnswerKind, Column, Reference, Role
from minga.inference.tensors import Array


@dataclass(eq=False)
class Sketch:
    """What was counted.

    Attributes:
        reference: whose bins these are.
        rows: how many rows.
        counts: for each column of the reference, how many values fell into each bin.
        missing: for each column, how many values were missing.
        outside: for each column, how many were below or above all of the training data.
        unknown: for each column, how many were none of the categories.
        outliers: how many rows were outliers.
    """

    reference: Reference
    rows: int = 0
    counts: list[Counts] = field(default_factory=list)
    missing: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    outside: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    unknown: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    outliers: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            columns = self.reference.columns
            self.counts = [np.zeros(len(column.shares), np.int64) for column in columns]
            self.missing, self.outside, self.unknown = np.zeros((3, len(columns)), np.int64)

    def add(self, inputs: Array, outputs: Array | None) -> None:
        """Count rows.

        Args:
            inputs: shape `(n, ...)`, numbers or texts.
            outputs: shape `(n, ...)`, numbers; None if the caller did not ask for them.
        """
        table = self._add_table(Role.INPUT, inputs)
        if outputs is not None:
            self._add_table(Role.OUTPUT, outputs)
            self._add_answers(outputs)
            if self.reference.losses is not None and table is not None:
                self._add_losses(self.reference.losses, table, outputs)
        self.rows += len(inputs)

    def merge(self, other: Self) -> None:
        """Add the counts of another sketch.

        Raises:
            ValueError: it was counted by another reference's bins.
        """
        if other.reference.digest != self.reference.digest:
            raise ValueError("sketches of different references do not add up")
        self.rows += other.rows
        self.outliers += other.outliers
        for place, counts in enumerate(other.counts):
            self.counts[place] += counts
        self.missing += other.missing
        self.outside += other.outside
        self.unknown += other.unknown

    def of_column(self, role: Role) -> Counts | None:
        """Give the counts of the one column of a role; None if there is none."""
        for column, counts in zip(self.reference.columns, self.counts, strict=True):
            if column.role is role:
                return counts
        return None

    def to_json(self) -> dict[str, Any]:
        """Give the counts as plain values, without the reference but with its digest."""
        return {
            "reference": self.reference.digest,
            "rows": self.rows,
            "outliers": self.outliers,
            "counts": [counts.tolist() for counts in self.counts],
            "missing": self.missing.tolist(),
            "outside": self.outside.tolist(),
            "unknown": self.unknown.tolist(),
        }

    @classmethod
    def from_json(cls, reference: Reference, given: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            ValueError: it was counted by another reference's bins.
        """
        if given["reference"] != reference.digest:
            raise ValueError("the sketch is of another reference")
        return cls(
            reference=reference,
            rows=int(given["rows"]),
            outliers=int(given["outliers"]),
            counts=[np.asarray(counts, np.int64) for counts in given["counts"]],
            missing=np.asarray(given["missing"], np.int64),
            outside=np.asarray(given["outside"], np.int64),
            unknown=np.asarray(given["unknown"], np.int64),
        )

    def _add_table(self, role: Role, array: Array) -> Floats | None:
        """Count a tensor into the columns of a role; gives it by these columns, if there is one."""
        places = [
            place for place, column in enumerate(self.reference.columns) if column.role is role
        ]
        if not places or not len(array):
            return None
        columns = [self.reference.columns[place] for place in places]
        table = _as_table(array, columns)
        self._add_columns(places, table)
        if role is Role.INPUT:
            self.outliers += self._num_outliers(columns, table)
        return table

    def _add_columns(self, places: list[int], table: Floats) -> None:
        """Count a table, shape `(columns, n)`, into the columns at these places."""
        columns = [self.reference.columns[place] for place in places]
        is_present = np.isfinite(table)
        num_present = is_present.sum(axis=1)
        self.missing[places] += table.shape[1] - num_present
        low = np.array([column.low for column in columns])[:, None]
        high = np.array([column.high for column in columns])[:, None]
        # A missing value is not a number, and neither below nor above anything.
        num_outside = (((table < low) | (table > high)) & is_present).sum(axis=1)
        for row, (place, column) in enumerate(zip(places, columns, strict=True)):
            self.counts[place] += bin_counts(column.edge_array, table[row])
            if column.categories:
                num_known = int(np.isin(table[row], column.categories).sum())
                self.unknown[place] += int(num_present[row]) - num_known
            else:
                self.outside[place] += num_outside[row]

    def _add_losses(self, losses: LossTree, inputs: Floats, outputs: Array) -> None:
        """Count rows by the errors that are to be expected of them."""
        place = next(
            place for place, one in enumerate(self.reference.columns) if one.role is Role.SCORE
        )
        means = np.array([column.mean for column in self.reference.of_role(Role.INPUT)])
        rows = loss_rows(means, inputs, outputs)
        self._add_columns([place], losses.leaf_of(rows)[None])

    def _num_outliers(self, columns: list[Column], table: Floats) -> int:
        if self.reference.outliers is None:
            return 0
        lengths = outlier_lengths(columns, table)
        return int((lengths > self.reference.outliers.threshold).sum())

    def _add_answers(self, outputs: Array) -> None:
        answers = self.reference.answers
        if answers is None or answers.kind is AnswerKind.NUMBER or not len(outputs):
            return
        scores, classes = scores_of(answers.kind, outputs)
        for place, column in enumerate(self.reference.columns):
            if column.role is Role.SCORE:
                self._add_columns([place], scores[None])
            elif column.role is Role.ANSWER and classes is not None:
                self._add_columns([place], classes[None])


def scores_of(kind: AnswerKind, outputs: Array) -> tuple[Floats, Floats | None]:
    """Give what answers are chosen by, and the classes that are chosen, both of shape `(n,)`.

    Args:
        kind: what the model answers.
        outputs: shape `(n,)`, `(n, 1)`, or `(n, classes)`.
    """
    table = outputs.reshape(len(outputs), -1).astype(np.float64)
    if kind is not AnswerKind.CLASS:
        return table[:, 0], None
    ordered = np.sort(table, axis=1)
    return ordered[:, -1] - ordered[:, -2], table.argmax(axis=1).astype(np.float64)


def loss_rows(means: Floats, inputs: Floats, outputs: Array) -> Floats:
    """Give the rows that a tree of losses looks at: inputs, missing ones as the mean, and answers.

    Args:
        means: of the inputs' columns.
        inputs: `(columns, n)`.
        outputs: `(n,)` or `(n, 1)`.

    Returns:
        Shape `(columns + 1, n)`.
    """
    known = np.where(np.isfinite(inputs), inputs, means[:, None])
    return np.concatenate([known, outputs.reshape(1, -1).astype(np.float64)])


def outlier_lengths(columns: list[Column], table: Floats) -> Floats:
    """Give the root mean square of each row's standardised numbers, missing ones as the mean.

    Args:
        columns: of the inputs.
        table: `(columns, n)`.

    Returns:
        Shape `(n,)`.
    """
    places = [
        place
        for place, column in enumerate(columns)
        if column.deviation > 0 and not column.categories
    ]
    if not places:
        return np.zeros(table.shape[1])
    means = np.array([columns[place].mean for place in places])[:, None]
    deviations = np.array([columns[place].deviation for place in places])[:, None]
    numbers = table if len(places) == len(table) else table[places]
    with np.errstate(over="ignore", invalid="ignore"):
        standardised = (numbers - means) / deviations
        standardised[~np.isfinite(standardised)] = 0
        lengths: NDArray[np.float64] = np.sqrt(np.einsum("cn,cn->n", standardised, standardised))
    return lengths / math.sqrt(len(places))


def _as_table(array: Array, columns: list[Column]) -> Floats:
    """Give a tensor's values by the reference's columns, shape `(columns, n)`."""
    num_rows = len(array)
    if array.dtype.kind in "OUS":
        return _read_texts(array.reshape(num_rows, -1), columns)
    flat: Array = array.reshape(num_rows, -1)
    if array.ndim > 2 or flat.shape[1] > MAX_COLUMNS:
        octets = np.ascontiguousarray(flat).view(np.uint8).sum(axis=1, dtype=np.int64)
        flat = flat[np.arange(num_rows), octets % flat.shape[1]][:, None]
    # Each column's values beside each other: they are looked at column by column.
    return np.ascontiguousarray(flat.T, np.float64)


def _read_texts(cells: Array, columns: list[Column]) -> Floats:
    """Read a table of texts as its model does: places of categories, and numbers written out."""
    table = np.full(cells.shape[::-1], np.nan)
    for place, column in enumerate(columns):
        known = dict(zip(column.names, column.categories, strict=False))
        table[place] = [_read(text, known) for text in cells[:, place]]
    return table


def _read(text: str, known: Mapping[str, float]) -> float:
    if known:
        return known.get(text, np.nan if text == "" else -1.0)
    try:
        return float(text)
    except ValueError:
        return np.nan
