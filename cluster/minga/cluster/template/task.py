"""Detect the anomalous state of a space shuttle from nine sensors."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Params, Split, Splits, Task, choice, loguniform

SHARE_TO_VALIDATE = 0.2


class ShuttleAnomaly(Task):
    """Detect anomalies in sensor readings; an output above 0 means anomaly."""

    name = "shuttle-anomaly"
    columns = tuple(f"f{index}" for index in range(1, 10))
    defaults = {"lr": 3e-3, "hidden": 32, "batch_size": 64}
    search_space = {"lr": loguniform(1e-3, 3e-2), "hidden": choice([16, 32, 64])}
    objective = Maximize("average_precision")

    def data(self, source: str) -> Splits:
        """Read a CSV file; the test split is `test.csv` beside it, the same for every site."""
        readings = read(Path(source))
        order = np.random.default_rng(0).permutation(len(readings))
        num_validation = max(1, round(len(readings) * SHARE_TO_VALIDATE))
        validation = split(readings[order[:num_validation]])
        test_file = Path(source).with_name("test.csv")
        return Splits(
            train=split(readings[order[num_validation:]]),
            validation=validation,
            test=split(read(test_file)) if test_file.exists() else validation,
        )

    def model(self, params: Params) -> nn.Module:
        """Build a network with one hidden layer; its inputs are standardised already."""
        hidden = int(params["hidden"])
        return nn.Sequential(
            nn.Linear(len(self.columns), hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
            nn.Flatten(start_dim=0),
        )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean cross-entropy; outputs are logits of shape (n,)."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Judge the ranking of readings; a site without any anomaly has no value."""
        # Loaded only here: devices train far more often than they measure.
        from sklearn.metrics import average_precision_score, roc_auc_score

        if targets.min() == targets.max():
            return {"average_precision": float("nan"), "roc_auc": float("nan")}
        return {
            "average_precision": float(average_precision_score(targets, outputs)),
            "roc_auc": float(roc_auc_score(targets, outputs)),
        }

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Turn logits into probabilities, so that the gates judge their calibration."""
        return torch.sigmoid(torch.from_numpy(outputs)).numpy()


def read(file: Path) -> np.ndarray:
    """Read a table of numbers with one line of titles, shape (n, 10)."""
    return np.loadtxt(file, np.float32, delimiter=",", skiprows=1, ndmin=2)


def split(readings: np.ndarray) -> Split:
    """Take the last column as the target."""
    return Split(inputs=readings[:, :-1], targets=readings[:, -1])
