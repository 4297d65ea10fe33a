"""The Tasks of benchmarks that simulate federations: handwritten digits, and plain networks."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rivals.simulation_work import BATCH_SIZE, LEARNING_RATE, NUM_HIDDEN
from sklearn.datasets import load_digits
from torch import nn

from minga.training import Maximize, Split, Splits, Task

NUM_TRAIN: Final = 1437
ORDER_SEED: Final = 0
WRITERS_TRAIN: Final = tuple(f"mnist_train_{part}.npz" for part in range(3))
WRITERS_TEST: Final = "mnist_test.npz"


class Digits(Task):
    """Tell scikit-learn's digits apart by two dense layers and gradient descent."""

    name = "digits"
    defaults = {"lr": LEARNING_RATE, "batch_size": BATCH_SIZE}  # noqa: RUF012
    objective = Maximize("accuracy")
    widths = (64, NUM_HIDDEN, 10)

    def data(self, source: str) -> Splits:  # noqa: ARG002
        """Read scikit-learn's own digits; the last fifth tests."""
        digits = load_digits()
        order = np.random.default_rng(ORDER_SEED).permutation(len(digits.target))
        inputs, targets = (digits.data[order] / 16).astype(np.float32), digits.target[order]
        rest = Split(inputs=inputs[NUM_TRAIN:], targets=targets[NUM_TRAIN:])
        train = Split(inputs=inputs[:NUM_TRAIN], targets=targets[:NUM_TRAIN])
        return Splits(train=train, validation=rest, test=rest)

    def preparation(self, train: Split) -> nn.Module:  # noqa: ARG002
        """Take pixels as they are, 0 to 1, as the others do."""
        return nn.Identity()

    def model(self, params: Any) -> nn.Module:  # noqa: ARG002
        """Make the network."""
        num_inputs, num_hidden, num_classes = self.widths
        return nn.Sequential(
            nn.Linear(num_inputs, num_hidden), nn.ReLU(), nn.Linear(num_hidden, num_classes)
        )

    def optimiser(self, model: nn.Module, params: Any) -> torch.optim.Optimizer:
        """Descend along the gradient."""
        return torch.optim.SGD(model.parameters(), lr=params["lr"])

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean cross entropy."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Give the share of digits that are told right."""
        return {"accuracy": float(np.mean(outputs.argmax(axis=1) == targets))}


class Writers(Digits):
    """Tell MNIST's digits apart, with who wrote them; the source is a folder."""

    name = "writers"
    defaults = {"lr": 0.1, "batch_size": 20}  # noqa: RUF012
    widths = (784, 64, 10)

    def data(self, source: str) -> Splits:
        """Read the digits and who wrote them; MNIST's test digits are of other writers."""
        folder = Path(source)
        parts = [np.load(folder / name) for name in WRITERS_TRAIN]
        train, test = _split(parts), _split([np.load(folder / WRITERS_TEST)])
        return Splits(train=train, validation=test, test=test)


def _split(parts: list[Any]) -> Split:
    images, labels, writers = (
        np.concatenate([part[name] for part in parts]) for name in ("images", "labels", "writer")
    )
    inputs = images.reshape(len(images), -1).astype(np.float32) / 255
    return Split(inputs=inputs, targets=labels.astype(np.int64), owners=writers)
