"""The network's first part: it turns raw inputs into what the model learns from.

It is fitted on the training split alone, and it is inside the exported model: training, serving and
devices cannot prepare inputs differently.

    numbers       missing values become the mean; shifted and scaled to mean 0 and deviation 1
    categories    one column for each declared value; a missing or unknown value is none of them
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.training.errors import TaskError
from minga.training.schema import (
    category_values,
    infer_schema,
    prepared_width,
    text_categories,
)
from minga.training.stored import chunks_of, sample_of
from minga.training.task import Split

Categories = Mapping[str, Sequence[str | float]]


class Standardize(nn.Module):
    """Shifts and scales each column to mean 0 and deviation 1, by fixed numbers.

    The numbers are buffers: they are stored, exported and federated with the weights, and
    training does not move them. A missing value becomes 0, as the column's mean does.

    Attributes:
        mean: shape `(columns,)`.
        scale: shape `(columns,)`, the deviation; 1 where a column is constant.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: NDArray[Any], scale: NDArray[Any]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    @classmethod
    def fitted(cls, inputs: NDArray[Any]) -> Self:
        """Take mean and deviation from inputs of shape `(n, columns)`, missing values aside."""
        return cls(*moments(inputs))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the exported model's input name
        """Standardise inputs of shape `(batch, columns)`; the shape stays."""
        scaled = (input - self.mean) / self.scale
        return torch.where(torch.isnan(input), torch.zeros_like(scaled), scaled)


class PrepareTable(Standardize):
    """Standardises a table's numbers, and makes columns of 0 and 1 of its categories.

    Which values a category has is declared by the Task and not fitted: devices must agree on it
    before they have seen each other's data.

    Attributes:
        mean: shape `(numbers,)`, of the columns that are no categories.
        scale: of the same shape.
        texts: place of a column -> the texts that its numbers stand for, if they stand for any.
        width: columns of the output: the numbers in their order, then the categories' in theirs.
    """

    def __init__(
        self,
        mean: NDArray[Any],
        scale: NDArray[Any],
        *,
        columns: Sequence[str],
        categories: Categories,
    ) -> None:
        super().__init__(mean, scale)
        self.columns = tuple(columns)
        self.texts = text_categories(columns, categories)
        self._places = [columns.index(name) for name in columns if name in categories]
        self.register_buffer("_numbers", _places_of_numbers(columns, categories), persistent=False)
        for place in self._places:
            values = torch.tensor(category_values(categories[columns[place]]))
            self.register_buffer(f"_values_{place}", values, persistent=False)
        self.width = prepared_width(columns, categories)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the exported model's input name
        """Prepare inputs of shape `(batch, columns)`; the result's is `(batch, width)`."""
        parts = [super().forward(torch.index_select(input, 1, self.get_buffer("_numbers")))]
        for place in self._places:
            column = input[:, place : place + 1]
            parts.append((column == self.get_buffer(f"_values_{place}")).to(input.dtype))
        return torch.cat(parts, dim=1)


class OnlyColumns(nn.Module):
    """Puts one ordinary value in place of each column that a model may not go by.

    Rows stay as wide as they are, so whatever comes behind, and whoever sends rows, needs no
    change. The value is a buffer, and travels with the weights.

    Attributes:
        ordinary: shape `(columns,)`: a number's mean, a category's most frequent value.
    """

    ordinary: Tensor

    def __init__(self, ordinary: NDArray[Any], places: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ordinary", torch.tensor(ordinary, dtype=torch.float32))
        kept = torch.zeros(len(ordinary), dtype=torch.bool)
        kept[list(places)] = True
        self.register_buffer("_kept", kept, persistent=False)

    @classmethod
    def fitted(cls, train: Split, columns: Sequence[str], features: Sequence[str]) -> Self:
        """Take the ordinary values from a training split of shape `(n, columns)`.

        Raises:
            TaskError: the inputs are no table of these columns, or a feature is none of them.
        """
        unknown = sorted(set(features) - set(columns))
        is_table = train.inputs.ndim == 2 and train.inputs.dtype.kind == "f"
        if unknown or not is_table or len(columns) != train.inputs.shape[1]:
            raise TaskError(
                f"features are {', '.join(features)}, the Task's columns are "
                f"{', '.join(columns) or 'not named'}, and inputs have shape "
                f"{train.inputs.shape[1:]}; features are some of the columns of a table of floats"
            )
        mean, _ = moments(train.inputs)
        ordinary = [
            _most_frequent(train, place) if kind == "category" else mean[place]
            for place, kind in enumerate(column.kind for column in infer_schema(train).columns)
        ]
        return cls(np.asarray(ordinary), [columns.index(name) for name in features])

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the exported model's input name
        """Keep the columns that count, of inputs of shape `(batch, columns)`; the shape stays."""
        return torch.where(self.get_buffer("_kept"), input, self.ordinary)


def table_of(preparation: nn.Module) -> PrepareTable | None:
    """Find the part of a preparation that knows a table's texts, if there is one."""
    found = (part for part in preparation.modules() if isinstance(part, PrepareTable))
    return next(found, None)


def _most_frequent(train: Split, place: int) -> float:
    values = sample_of(train.inputs)[:, place]
    values, counts = np.unique(values[np.isfinite(values)], return_counts=True)
    return float(values[counts.argmax()]) if len(values) else 0.0


def moments(
    inputs: NDArray[Any], places: Sequence[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give mean and deviation of columns, missing values aside; 1 where a column is constant.

    Args:
        inputs: of shape `(n, columns)`.
        places: of the columns to look at; None means all.
    """
    wanted = slice(None) if places is None else list(places)
    num_columns = inputs.shape[1] if places is None else len(places)
    num_present, total, squares = (np.zeros(num_columns) for _ in range(3))
    for chunk in chunks_of(inputs):
        part = chunk[:, wanted]
        is_present = np.isfinite(part)
        num_present += is_present.sum(axis=0)
        total += np.where(is_present, part, 0).astype(np.float64).sum(axis=0)
    num_present = np.maximum(num_present, 1)
    mean = total / num_present
    for chunk in chunks_of(inputs):
        part = chunk[:, wanted]
        squares += (np.where(np.isfinite(part), part - mean, 0) ** 2).sum(axis=0)
    variance = squares / num_present
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def default_preparation(
    train: Split, columns: Sequence[str] = (), categories: Categories | None = None
) -> nn.Module:
    """Standardise float inputs of shape `(n, columns)`; leave any other as it is.

    Args:
        train: what means and deviations are taken from.
        columns: names of the columns, where categories are declared.
        categories: column -> its values; they become columns of 0 and 1.

    Raises:
        TaskError: a category is none of the columns, or there are not as many columns as names.
    """
    if train.inputs.ndim != 2 or train.inputs.dtype.kind != "f" or len(train) == 0:
        return nn.Identity()
    if not categories:
        return Standardize.fitted(train.inputs)
    unknown = sorted(set(categories) - set(columns))
    if unknown or len(columns) != train.inputs.shape[1]:
        raise TaskError(
            f"categories are declared for {', '.join(categories)}, columns are "
            f"{', '.join(columns) or 'not named'}, and inputs have {train.inputs.shape[1]}; "
            "name all columns"
        )
    mean, scale = moments(train.inputs, _places_of_numbers(columns, categories).tolist())
    return PrepareTable(mean, scale, columns=columns, categories=categories)


def _places_of_numbers(columns: Sequence[str], categories: Categories) -> Tensor:
    places = [place for place, name in enumerate(columns) if name not in categories]
    return torch.tensor(places, dtype=torch.int64)
