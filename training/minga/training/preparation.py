"""The network's first part: it turns raw inputs into what the model learns from."""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.training.task import Split


class Standardize(nn.Module):
    """Shifts and scales each column to mean 0 and deviation 1, by fixed numbers.

    The numbers are buffers: they are stored, exported and federated with the weights, and
    training does not move them.

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
        is_present = np.isfinite(inputs)
        num_present = np.maximum(is_present.sum(axis=0), 1)
        values = np.where(is_present, inputs, 0).astype(np.float64)
        mean = values.sum(axis=0) / num_present
        variance = (np.where(is_present, values - mean, 0) ** 2).sum(axis=0) / num_present
        return cls(mean, np.where(variance > 0, np.sqrt(variance), 1.0))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the exported model's input name
        """Standardise inputs of shape `(batch, columns)`; the shape stays."""
        return (input - self.mean) / self.scale


def default_preparation(train: Split) -> nn.Module:
    """Standardise float inputs of shape `(n, columns)`; leave any other as it is."""
    if train.inputs.ndim == 2 and train.inputs.dtype.kind == "f" and len(train) > 0:
        return Standardize.fitted(train.inputs)
    return nn.Identity()
