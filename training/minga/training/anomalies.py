"""Tasks without targets: what is unlike the data that was learned from.

An `AnomalyTask` needs a name, columns and data. Its own model is an autoencoder; `minga run --auto`
compares it with an isolation forest. An output above 0 is an anomaly: the threshold is part of the
model, chosen on the validation split so that a given share of ordinary rows lies above it.

Models do not learn what an anomaly is, but somebody has to say whether they find any. Where
anomalies are known (target 1) they judge, and are never learned from. Where none is known,
`unlabelled` makes some up for validation and test: rows whose columns are each drawn from another
row (Hastie, Tibshirani, Friedman, "The elements of statistical learning", 2009, section 14.2.4).
Such rows have ordinary values in unusual company, so a figure on them says how well a model knows
what goes together, and not more.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.training.data.tables import in_order
from minga.training.evaluate import predict
from minga.training.space import Maximize, Params, choice, loguniform
from minga.training.task import Split, Splits, Task


class AnomalyTask(Task):
    """Find rows that are unlike the others, by an autoencoder unless `model` is overridden.

    Give `name`, `columns` and `data`. Targets are 1 for known anomalies, and 0 for everything else.
    A model of your own gives one number for each row, the larger the more unusual, and has a
    float buffer called `threshold`, which is taken off it.

    Attributes:
        false_alarms: share of the ordinary rows of the validation split that lie above the
            threshold.
    """

    defaults = {"lr": 3e-3, "batch_size": 64, "hidden": 32, "code": 4}  # noqa: RUF012 - as in Tasks
    search_space = {"lr": loguniform(1e-3, 1e-2), "code": choice([2, 4, 8])}  # noqa: RUF012
    objective = Maximize("average_precision")
    false_alarms: ClassVar[float] = 0.01

    def model(self, params: Params) -> nn.Module:
        """Build an autoencoder of prepared rows."""
        return Autoencoder(self.width, int(params["hidden"]), int(params["code"]))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the mean output of the rows that are not known to be anomalies."""
        is_ordinary = (targets < 0.5).to(outputs.dtype)
        return (outputs * is_ordinary).sum() / is_ordinary.sum().clamp(min=1)

    def metrics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
        """Judge the ranking of rows, and what lies above the threshold."""
        from sklearn.metrics import average_precision_score, roc_auc_score

        is_anomaly, is_alarm = targets > 0.5, outputs > 0
        both = bool(is_anomaly.any() and not is_anomaly.all())
        return {
            "average_precision": float(average_precision_score(is_anomaly, outputs))
            if both
            else float("nan"),
            "roc_auc": float(roc_auc_score(is_anomaly, outputs)) if both else float("nan"),
            "found": float(is_alarm[is_anomaly].mean()) if is_anomaly.any() else float("nan"),
            "false_alarms": float(is_alarm[~is_anomaly].mean())
            if not is_anomaly.all()
            else float("nan"),
        }

    def finish(self, network: nn.Module, validation: Split) -> None:
        """Choose the threshold on the validation split."""
        threshold = next(
            (one for name, one in network.named_buffers() if name.endswith("threshold")), None
        )
        if threshold is None:
            return
        with torch.no_grad():
            threshold.zero_()
            scores = predict(network, validation.inputs)
            threshold.fill_(threshold_of(scores, validation.targets, self.false_alarms))


class Autoencoder(nn.Module):
    """Squeezes rows through a few numbers and gives how far off what comes out is.

    Args:
        width: of the rows.
        hidden: units of the layers before and after the code.
        code: numbers that a row is squeezed into.
    """

    threshold: Tensor

    def __init__(self, width: int, hidden: int, code: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, code))
        self.decode = nn.Sequential(nn.ReLU(), nn.Linear(code, hidden), nn.ReLU())
        self.restore = nn.Linear(hidden, width)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the exported model's input name
        """Give the mean squared error of each row, less the threshold, shape `(batch,)`."""
        restored: Tensor = self.restore(self.decode(self.encode(input)))
        return ((restored - input) ** 2).mean(dim=1) - self.threshold


def threshold_of(scores: NDArray[Any], targets: NDArray[Any], false_alarms: float) -> float:
    """Give what so large a share of the ordinary rows' scores lies above.

    Args:
        scores: shape `(n,)`.
        targets: 1 for known anomalies; shape `(n,)`.
        false_alarms: the share.
    """
    ordinary = scores[targets < 0.5]
    return float(np.quantile(ordinary if len(ordinary) else scores, 1 - false_alarms))


def unlabelled(
    inputs: NDArray[Any], *, seed: int = 0, validation: float = 0.2, test: float = 0.2
) -> Splits:
    """Split rows of which nobody knows whether they are anomalies; see the module.

    The training split has them as they are. In the other two, made-up anomalies are added, one for
    each ten rows.

    Args:
        inputs: shape `(n, columns)`.
        seed: of the split and of what is made up.
        validation: share of the rows.
        test: share of the rows.

    Raises:
        DataError: the shares leave nothing to learn from.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(inputs))
    zeros = np.zeros(len(inputs), np.float32)
    splits = in_order(inputs[order], zeros, validation=validation, test=test)
    return Splits(
        train=splits.train,
        validation=_with_made_up(splits.validation, generator),
        test=_with_made_up(splits.test, generator),
    )


def _with_made_up(split: Split, generator: np.random.Generator) -> Split:
    num_rows = max(len(split) // 10, 1)
    columns = [generator.choice(column, num_rows) for column in split.inputs.T]
    return Split(
        inputs=np.concatenate([split.inputs, np.stack(columns, axis=1)]),
        targets=np.concatenate([split.targets, np.ones(num_rows, np.float32)]),
    )
