"""Class weights: rare classes count for more in a Task's own loss.

The loss of a batch is the mean over its examples, by contract. So the mean over each class alone
is the Task's loss of that class's examples, and the weighted mean of the batch is a sum over
classes, whatever the loss is. It is divided by the number of examples and not by the sum of their
weights: so the means of several workers' parts are the mean of the whole batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minga.training.errors import TaskError
from minga.training.space import Params

MAX_CLASSES = 1000
"""More distinct targets than this are no classes."""

Loss = Callable[[Tensor, Tensor], Tensor]


def weights_of(params: Params, targets: NDArray[np.generic]) -> Tensor | None:
    """Give the weight of every training example, shape `(n,)`; None if all count alike.

    Args:
        params: `class_weights`: `none`, or `balanced`, by which each class counts as much as any
            other: `n / (num_classes * n_class)`, as scikit-learn has it.
        targets: of the training split, shape `(n,)`.

    Raises:
        TaskError: there is no such weighting, or the targets are no classes.
    """
    name = str(params.get("class_weights", "none"))
    if name == "none":
        return None
    if name != "balanced":
        raise TaskError(f"class_weights = {name!r} is unknown; use none or balanced")
    classes, places, counts = np.unique(targets, return_inverse=True, return_counts=True)
    if targets.ndim != 1 or len(classes) > MAX_CLASSES or len(classes) < 2:
        raise TaskError(
            f"class_weights = 'balanced' but the targets, of shape {targets.shape}, have "
            f"{len(classes)} distinct values; it needs one class for each example"
        )
    weights = len(targets) / (len(classes) * counts)
    return torch.from_numpy(weights[places].astype(np.float32))


def weighted_loss(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Give the mean loss over a batch in which examples count by weight.

    Args:
        loss: the Task's, a mean over examples.
        outputs: of the model, shape `(n, ...)`.
        targets: shape `(n, ...)`.
        weights: shape `(n,)`; examples of one weight are put into the loss together.
    """
    parts = []
    for weight in torch.unique(weights):
        chosen = weights == weight
        parts.append(weight * chosen.sum() * loss(outputs[chosen], targets[chosen]))
    return torch.stack(parts).sum() / len(weights)
