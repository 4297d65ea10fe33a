"""The Task of `data.py`: tell from 24 columns whether the first four add up to more than 0."""

# ruff: noqa: RUF012 - a Task as a researcher writes it

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Split, Splits, Task


class Readings(Task):
    """Its data is made and split by the benchmark."""

    name = "readings"
    columns = tuple(f"x{index}" for index in range(24))
    defaults = {"lr": 0.01, "batch_size": 8192}
    objective = Maximize("accuracy")

    def data(self, source: str) -> Splits:
        """Refuse: the benchmark reads."""
        raise NotImplementedError

    def model(self, params: dict) -> nn.Module:  # noqa: ARG002 - nothing is searched
        """Build a network with one hidden layer."""
        return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean cross-entropy."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Give the share of right answers."""
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Give the probability that it is more than 0."""
        return 1 / (1 + np.exp(-outputs.astype(np.float64)))

    def slices(self, split: Split) -> dict[str, np.ndarray]:
        """Tell rows by the sign of a column that decides nothing."""
        return {"last column above 0": split.inputs[:, 23] > 0}
