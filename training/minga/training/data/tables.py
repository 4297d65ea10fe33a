"""From a table to what a network learns from: a matrix of numbers, and three splits of it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minga.training.errors import DataError
from minga.training.task import Split, Splits

if TYPE_CHECKING:
    import pyarrow as pa

UNKNOWN = -1.0
"""Stands for a text that is none of its column's categories."""


def matrix(
    table: "pa.Table | pa.RecordBatch",
    columns: Sequence[str],
    categories: Mapping[str, Sequence[str | float]] = MappingProxyType({}),
) -> NDArray[np.float32]:
    """Make numbers of columns, shape `(rows, columns)`.

    Missing values become NaN. Texts become their places among the column's categories, and -1 if
    they are none of them, which the data check finds.

    Args:
        table: in memory, or a piece of a stream.
        columns: the columns to take, in this order.
        categories: of the columns that hold text.

    Raises:
        DataError: a column is missing or holds neither numbers nor declared categories.
    """
    out = np.empty((table.num_rows, len(columns)), np.float32)
    for index, name in enumerate(columns):
        out[:, index] = numbers(table, name, categories.get(name, ()))
    return out


def numbers(
    table: "pa.Table | pa.RecordBatch", name: str, categories: Sequence[str | float] = ()
) -> NDArray[np.float64]:
    """Make numbers of one column, shape `(rows,)`, as `matrix` does.

    Raises:
        DataError: the column is missing or holds neither numbers nor declared categories.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if name not in table.column_names:
        raise DataError(f"there is no column {name}; there are {', '.join(table.column_names)}")
    column = table.column(name)
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = [value for value in categories if isinstance(value, str)]
        if not texts:
            example = next((value.as_py() for value in column if value.is_valid), "")
            raise DataError(
                f"column {name} holds text such as {example!r}; say which texts there are: "
                f'categories = {{"{name}": (...)}}'
            )
        places = pc.index_in(column, value_set=pa.array(texts, kind), skip_nulls=True)
        codes = pc.fill_null(places.cast(pa.float64()), UNKNOWN)
        column = pc.if_else(pc.is_valid(column), codes, pa.scalar(None, pa.float64()))
    elif not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"column {name} holds {kind}; make numbers of it first")
    values: NDArray[Any] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def shuffled(
    inputs: NDArray[Any],
    targets: NDArray[Any],
    *,
    seed: int = 0,
    validation: float = 0.2,
    test: float = 0.2,
) -> Splits:
    """Split examples that do not depend on each other, at random; the seed decides how.

    Raises:
        DataError: the shares leave nothing to learn from.
    """
    order = np.random.default_rng(seed).permutation(len(inputs))
    return in_order(inputs[order], targets[order], validation=validation, test=test)


def in_order(
    inputs: NDArray[Any], targets: NDArray[Any], *, validation: float = 0.2, test: float = 0.2
) -> Splits:
    """Split examples that are sorted by time: the first to learn from, the last to judge by.

    Raises:
        DataError: the shares leave nothing to learn from.
    """
    num_test, num_validation = round(len(inputs) * test), round(len(inputs) * validation)
    num_train = len(inputs) - num_test - num_validation
    if min(num_train, num_validation, num_test) < 1:
        raise DataError(
            f"{len(inputs)} examples cannot be split into {1 - validation - test:.0%}, "
            f"{validation:.0%} and {test:.0%}; give more examples or other shares"
        )
    ends = [num_train, num_train + num_validation]
    parts = zip(np.split(inputs, ends), np.split(targets, ends), strict=True)
    train, chosen_by, judged_by = (Split(inputs=x, targets=y) for x, y in parts)
    return Splits(train=train, validation=chosen_by, test=judged_by)
