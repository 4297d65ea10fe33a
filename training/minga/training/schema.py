"""What valid data looks like, inferred from the training split.

Here are the types, the statistics behind drift are in `minga.training.profile`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minga.training.document import Document
from minga.training.task import Split

MAX_CATEGORIES = 20
"""A column of at most this many different whole numbers is a category."""

MAX_COLUMNS = 512
"""Wider inputs, and those that are no table, are described as one column of all values."""

ColumnKind = Literal["number", "category"]


class Column(Document):
    """One column of the inputs."""

    name: str
    kind: ColumnKind
    low: float
    high: float
    categories: tuple[float, ...]
    """The values of a category, in order; empty for a number."""
    missing: float
    """Share of missing values, 0 to 1."""


class Schema(Document):
    """Shapes, types and columns of valid data; shapes leave the batch axis out."""

    input_shape: tuple[int, ...]
    input_dtype: str
    target_shape: tuple[int, ...]
    target_dtype: str
    columns: tuple[Column, ...]

    def breaks(self, other: "Schema") -> tuple[str, ...]:
        """Say what a client written for this schema would trip over in `other`."""
        found = [
            f"{name} is {getattr(other, name)}, was {getattr(self, name)}"
            for name in ("input_shape", "input_dtype", "target_shape", "target_dtype")
            if getattr(other, name) != getattr(self, name)
        ]
        mine = [column.name for column in self.columns]
        theirs = [column.name for column in other.columns]
        if mine != theirs:
            found.append(f"columns are {theirs}, were {mine}")
        return tuple(found)


def infer_schema(train: Split, names: Sequence[str] = ()) -> Schema:
    """Describe a training split.

    Args:
        train: at least one example.
        names: of the columns of inputs of shape `(n, columns)`; otherwise they are numbered.
    """
    return Schema(
        input_shape=train.inputs.shape[1:],
        input_dtype=str(train.inputs.dtype),
        target_shape=train.targets.shape[1:],
        target_dtype=str(train.targets.dtype),
        columns=tuple(
            _describe(name, values) for name, values in iterate_columns(train.inputs, names)
        ),
    )


def iterate_columns(
    inputs: NDArray[Any], names: Sequence[str] = ()
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Walk over the columns of a table; anything else is one column of all its values.

    Yields:
        the column's name and its values, shape `(n,)`.
    """
    if inputs.ndim == 2 and inputs.shape[1] <= MAX_COLUMNS:
        for index in range(inputs.shape[1]):
            name = names[index] if index < len(names) else f"x{index}"
            yield name, inputs[:, index].astype(np.float64)
    else:
        yield "values", inputs.reshape(-1).astype(np.float64)


def _describe(name: str, values: NDArray[np.float64]) -> Column:
    present = values[np.isfinite(values)]
    distinct = np.unique(present)
    is_category = len(distinct) <= MAX_CATEGORIES and bool(np.all(distinct == np.round(distinct)))
    return Column(
        name=name,
        kind="category" if is_category else "number",
        low=float(distinct[0]) if len(distinct) else 0.0,
        high=float(distinct[-1]) if len(distinct) else 0.0,
        categories=tuple(map(float, distinct)) if is_category else (),
        missing=1 - len(present) / len(values) if len(values) else 0.0,
    )
