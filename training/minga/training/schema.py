"""What valid data looks like, inferred from the training split.

Here are the types, the statistics behind drift are in `minga.training.profile`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from minga.training.document import Document
from minga.training.errors import DataError
from minga.training.stored import chunks_of
from minga.training.task import Split

MAX_CATEGORIES = 20
"""A column of at most this many different whole numbers is a category."""

MAX_COLUMNS = 512
"""Wider inputs, and those that are no table, are described as one column of all values."""

MIN_UNIQUE = 100
"""So many whole numbers without a repetition are taken for an identifier."""

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
    whole: bool = False
    """Whether all values are whole numbers."""
    unique: bool = False
    """Whether no value is there twice, as in an identifier."""
    names: tuple[str, ...] = ()
    """What the categories are called where the data has text, in the order of `categories`."""

    def named(self, category: float) -> str:
        """Give what a category is called."""
        named = dict(zip(self.categories, self.names, strict=False))
        return named.get(category, f"{category:g}")


class Schema(Document):
    """Shapes, types and columns of valid data; shapes leave the batch axis out."""

    input_shape: tuple[int, ...]
    input_dtype: str
    target_shape: tuple[int, ...]
    target_dtype: str
    columns: tuple[Column, ...]
    targets: tuple[Column, ...] = ()

    @property
    def served_dtype(self) -> str:
        """What the exported model takes: text if a category is text, else the inputs' type."""
        return "string" if any(column.names for column in self.columns) else self.input_dtype

    def breaks(self, other: "Schema") -> tuple[str, ...]:
        """Say what a client written for this schema would trip over in `other`."""
        found = [
            f"{name} is {getattr(other, name)}, was {getattr(self, name)}"
            for name in ("input_shape", "input_dtype", "target_shape", "target_dtype")
            if getattr(other, name) != getattr(self, name)
        ]
        if other.served_dtype != self.served_dtype:
            found.append(f"the model takes {other.served_dtype}, took {self.served_dtype}")
        mine = [column.name for column in self.columns]
        theirs = [column.name for column in other.columns]
        if mine != theirs:
            found.append(f"columns are {theirs}, were {mine}")
        return tuple(found)

    def changes(self, other: "Schema") -> tuple[str, ...]:
        """Say in what `other` differs, column by column, for people to read."""
        mine = {f"inputs.{column.name}": column for column in self.columns}
        mine |= {f"targets.{column.name}": column for column in self.targets}
        theirs = {f"inputs.{column.name}": column for column in other.columns}
        theirs |= {f"targets.{column.name}": column for column in other.targets}
        found = list(self.breaks(other)) if mine.keys() == theirs.keys() else []
        for path in (*mine, *(path for path in theirs if path not in mine)):
            if path not in theirs:
                found.append(f"{path} is gone")
            elif path not in mine:
                found.append(f"{path} is new")
            else:
                found += _changes(path, mine[path], theirs[path])
        return tuple(found)


def _changes(path: str, column: Column, other: Column) -> list[str]:
    return [
        f"{path}: {name} is {getattr(other, name)}, was {getattr(column, name)}"
        for name in ("kind", "low", "high", "categories", "missing", "whole", "unique", "names")
        if getattr(other, name) != getattr(column, name)
    ]


def read_schema(file: Path) -> Schema:
    """Read a schema that people may have edited.

    Raises:
        DataError: the file is no schema; the message says where it is not.
    """
    try:
        return Schema.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file} is no schema: {path}: {first['msg']}; mend it, or remove it and write it "
            "anew with: minga data schema"
        ) from error


def infer_schema(
    train: Split,
    names: Sequence[str] = (),
    categories: Mapping[str, Sequence[str | float]] = MappingProxyType({}),
) -> Schema:
    """Describe a training split.

    Args:
        train: at least one example.
        names: of the columns of inputs of shape `(n, columns)`; otherwise they are numbered.
        categories: the values that a column may have, for columns where that is known.
    """
    table = train.targets[:, None] if train.targets.ndim == 1 else train.targets
    return Schema(
        input_shape=train.inputs.shape[1:],
        input_dtype=str(train.inputs.dtype),
        target_shape=train.targets.shape[1:],
        target_dtype=str(train.targets.dtype),
        columns=tuple(
            _known(column, categories.get(column.name, ()))
            for column in _described(train.inputs, names)
        ),
        targets=tuple(_described(table, ("target",) if train.targets.ndim == 1 else ())),
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


def _known(column: Column, categories: Sequence[str | float]) -> Column:
    """Put the categories that a Task declares in place of those that were seen."""
    if not categories:
        return column
    values = category_values(categories)
    texts = tuple(value for value in categories if isinstance(value, str))
    update = {"kind": "category", "categories": values, "names": texts}
    return column.model_copy(update={**update, "low": min(values), "high": max(values)})


def category_values(categories: Sequence[str | float]) -> tuple[float, ...]:
    """Give the numbers that stand for categories: themselves, or the places of texts."""
    if all(isinstance(value, str) for value in categories):
        return tuple(map(float, range(len(categories))))
    return tuple(map(float, categories))


def text_categories(
    columns: Sequence[str], categories: Mapping[str, Sequence[str | float]]
) -> dict[int, tuple[str, ...]]:
    """Give the places of columns whose categories are texts -> these texts."""
    return {
        columns.index(name): tuple(map(str, values))
        for name, values in categories.items()
        if any(isinstance(value, str) for value in values)
    }


def prepared_width(columns: Sequence[str], categories: Mapping[str, Sequence[str | float]]) -> int:
    """Give how many columns the default preparation makes of a table: one for each category."""
    return len(columns) - len(categories) + sum(map(len, categories.values()))


class _Seen:
    """What a column's values come to, chunk by chunk."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_values = self._num_present = self._num_distinct = self._num_chunks = 0
        self._low, self._high = np.inf, -np.inf
        self._few: NDArray[np.float64] | None = np.empty(0)
        self._whole = True

    def add(self, values: NDArray[np.float64]) -> None:
        """Look at more values, shape `(n,)`."""
        present = values[np.isfinite(values)]
        distinct = np.unique(present)
        self._num_values += len(values)
        self._num_present += len(present)
        self._num_distinct += len(distinct)
        self._num_chunks += 1
        if len(distinct):
            self._low = min(self._low, float(distinct[0]))
            self._high = max(self._high, float(distinct[-1]))
        self._whole = self._whole and bool(np.all(distinct == np.round(distinct)))
        if self._few is not None:
            few = np.union1d(self._few, distinct)
            self._few = few if len(few) <= MAX_CATEGORIES else None

    def column(self) -> Column:
        """Describe the column. Whether values repeat is only known of a single chunk."""
        is_category = self._few is not None and self._whole
        is_unique = self._num_chunks == 1 and self._num_distinct == self._num_values >= MIN_UNIQUE
        missing = 1 - self._num_present / self._num_values if self._num_values else 0.0
        return Column(
            name=self._name,
            kind="category" if is_category else "number",
            low=self._low if self._num_present else 0.0,
            high=self._high if self._num_present else 0.0,
            categories=tuple(map(float, self._few))
            if self._few is not None and is_category
            else (),
            missing=missing,
            whole=self._whole,
            unique=self._whole and not is_category and is_unique,
        )


def _described(array: NDArray[Any], names: Sequence[str] = ()) -> Iterator[Column]:
    seen: dict[str, _Seen] = {}
    for chunk in chunks_of(array):
        for name, values in iterate_columns(chunk, names):
            seen.setdefault(name, _Seen(name)).add(values)
    for column in seen.values():
        yield column.column()
