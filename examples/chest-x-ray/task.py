"""Tell pneumonia from chest X-rays of 28 x 28 pixels."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Params, Split, Splits, Task, choice, loguniform
from minga.training.data import read_arrays

JUDGES = "pneumoniamnist_valtest.npz"


class ChestXRay(Task):
    """Rank images by how likely they show pneumonia; an output above 0 means pneumonia."""

    name = "chest-x-ray"
    defaults = {"lr": 2e-3, "channels": 16, "batch_size": 64}
    search_space = {"lr": loguniform(5e-4, 5e-3), "channels": choice([8, 16])}
    objective = Maximize("roc_auc")

    def data(self, source: str) -> Splits:
        """Read the official splits: training beside validation and test."""
        if not Path(source).exists():
            return made_up()
        train, others = read_arrays(source), read_arrays(str(Path(source).with_name(JUDGES)))
        return Splits(
            train=split(train["images"], train["labels"]),
            validation=split(others["val_images"], others["val_labels"]),
            test=split(others["test_images"], others["test_labels"]),
        )

    def model(self, params: Params) -> nn.Module:
        """Build two convolutions and a linear layer."""
        channels = int(params["channels"])
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * channels * 7 * 7, 1),
            nn.Flatten(start_dim=0),
        )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean cross-entropy; outputs are logits of shape (n,)."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Judge the ranking, and the decision at 0."""
        from sklearn.metrics import roc_auc_score

        if targets.min() == targets.max():
            return {"roc_auc": float("nan"), "accuracy": float("nan")}
        return {
            "roc_auc": float(roc_auc_score(targets, outputs)),
            "accuracy": float(np.mean((outputs > 0) == (targets > 0.5))),
        }


def split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Scale pixels to 0 .. 1, shape (n, 1, 28, 28)."""
    pixels = images.reshape(-1, 1, 28, 28).astype(np.float32) / 255
    return Split(inputs=pixels, targets=labels.reshape(-1).astype(np.float32))


def made_up() -> Splits:
    """Make images up: noise, and in those of the sick a bright cloud somewhere in the middle."""
    warnings.warn("the real data is not there; made-up images take its place", stacklevel=2)
    generator = np.random.default_rng(0)

    def draw(num_images: int) -> Split:
        labels = generator.random(num_images) < 0.6
        images = generator.normal(90, 30, (num_images, 28, 28))
        rows, columns = np.mgrid[:28, :28]
        for place, is_sick in enumerate(labels):
            y, x = generator.integers(9, 19, 2)
            distance = (rows - y) ** 2 + (columns - x) ** 2
            images[place] += (90 if is_sick else 20) * np.exp(-distance / 30)
        return split(np.clip(images, 0, 255).astype(np.uint8), labels)

    return Splits(train=draw(800), validation=draw(300), test=draw(400))
