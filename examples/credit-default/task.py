"""Predict whether a credit card's holder will default next month."""

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from minga.training import Maximize, Params, Split, Splits, Task, choice, loguniform
from minga.training.data import matrix, numbers, read_table, shuffled

TARGET = "default.payment.next.month"
MONTHS = range(6)
DELAYS = ("PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6")


class CreditDefault(Task):
    """Rank holders by how likely they default; an output above 0 means default."""

    name = "credit-default"
    columns = (
        "LIMIT_BAL",
        "SEX",
        "EDUCATION",
        "MARRIAGE",
        "AGE",
        *DELAYS,
        *(f"BILL_AMT{month + 1}" for month in MONTHS),
        *(f"PAY_AMT{month + 1}" for month in MONTHS),
    )
    categories = {"SEX": (1, 2), "EDUCATION": tuple(range(7)), "MARRIAGE": tuple(range(4))}
    defaults = {"lr": 3e-3, "hidden": 32, "batch_size": 256}
    search_space = {"lr": loguniform(1e-3, 1e-2), "hidden": choice([16, 32, 64])}
    objective = Maximize("roc_auc")

    def data(self, source: str) -> Splits:
        """Read the table; three holders of five are learned from."""
        table = read_table(source) if Path(source).exists() else made_up()
        inputs = matrix(table, self.columns, self.categories)
        return shuffled(inputs, numbers(table, TARGET).astype(np.float32), seed=1)

    def model(self, params: Params) -> nn.Module:
        """Build a network with two hidden layers."""
        hidden = int(params["hidden"])
        return nn.Sequential(
            nn.Linear(self.width, hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
            nn.Flatten(start_dim=0),
        )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean cross-entropy; outputs are logits of shape (n,)."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Judge the ranking of holders; holders who all pay, or all default, have no ranking."""
        from sklearn.metrics import average_precision_score, roc_auc_score

        if targets.min() == targets.max():
            return {"roc_auc": float("nan"), "average_precision": float("nan")}
        return {
            "roc_auc": float(roc_auc_score(targets, outputs)),
            "average_precision": float(average_precision_score(targets, outputs)),
        }

    def slices(self, split: Split) -> dict[str, np.ndarray]:
        """Women and men must be ranked about equally well."""
        sex = split.inputs[:, self.columns.index("SEX")]
        return {"men": sex == 1, "women": sex == 2}


def made_up(num_rows: int = 4000) -> pa.Table:
    """Make a table of the same columns up, in which late payers default."""
    warnings.warn("the real data is not there; a made-up table takes its place", stacklevel=2)
    generator = np.random.default_rng(0)
    habit = generator.gamma(0.6, 1.0, num_rows)
    columns = {
        "LIMIT_BAL": generator.integers(1, 80, num_rows) * 10_000.0,
        "SEX": generator.integers(1, 3, num_rows),
        "EDUCATION": generator.choice(7, num_rows, p=[0.01, 0.35, 0.45, 0.15, 0.01, 0.02, 0.01]),
        "MARRIAGE": generator.choice(4, num_rows, p=[0.01, 0.45, 0.53, 0.01]),
        "AGE": generator.integers(21, 75, num_rows),
        TARGET: generator.random(num_rows) < 1 / (1 + np.exp(3 - 2 * habit)),
    }
    for month, delay in enumerate(DELAYS):
        columns[delay] = np.clip(generator.poisson(habit) - 1, -1, 8)
        columns[f"BILL_AMT{month + 1}"] = columns["LIMIT_BAL"] * generator.random(num_rows)
        columns[f"PAY_AMT{month + 1}"] = generator.exponential(4000 / (1 + habit))
    return pa.table(columns)
