"""Predictions and metrics of a network on a split."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from minga.training.errors import ShapeError, TaskError
from minga.training.network import one_thread
from minga.training.task import Split, Task

BATCH_EXAMPLES = 4096
"""Examples predicted at once: enough to be fast, few enough for large inputs."""


def predict(network: nn.Module, inputs: NDArray[Any]) -> NDArray[Any]:
    """Give the network's raw outputs for inputs of shape `(n, ...)`, in evaluation mode."""
    was_training = network.training
    device = device_of(network)
    network.eval()
    try:
        with torch.inference_mode(), one_thread():
            parts = [
                network(torch.from_numpy(inputs[start : start + BATCH_EXAMPLES].copy()).to(device))
                .cpu()
                .numpy()
                for start in range(0, len(inputs), BATCH_EXAMPLES)
            ]
    finally:
        network.train(was_training)
    return np.concatenate(parts)


def device_of(network: nn.Module) -> torch.device:
    """Give the device that a network's first tensor is on; the CPU for one without tensors."""
    first = next(network.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def evaluate(task: Task, network: nn.Module, split: Split) -> dict[str, float]:
    """Give the Task's metrics and its mean `loss` of a network on a split.

    Raises:
        ShapeError: the Task's loss or metrics fail on the network's outputs.
        TaskError: the objective's metric is missing.
    """
    return measure_with_loss(task, predict(network, split.inputs), split)


def measure_with_loss(task: Task, outputs: NDArray[Any], split: Split) -> dict[str, float]:
    """Give the Task's metrics and its mean `loss` of raw outputs on a split.

    Raises:
        ShapeError: the Task's loss or metrics fail on these shapes.
        TaskError: the objective's metric is missing.
    """
    metrics = measure(task, outputs, split.targets)
    try:
        with torch.inference_mode(), one_thread():
            loss = task.loss(torch.from_numpy(outputs), torch.from_numpy(split.targets.copy()))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ShapeError(
            f"{type(task).__name__}.loss fails on outputs {outputs.shape} and "
            f"targets {split.targets.shape}: {error}"
        ) from error
    return {"loss": float(loss)} | metrics


def measure(task: Task, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    """Give the Task's metrics of raw outputs.

    Raises:
        ShapeError: the Task's metrics fail on these shapes.
        TaskError: the objective's metric is missing.
    """
    try:
        metrics = {name: float(value) for name, value in task.metrics(outputs, targets).items()}
    except (ValueError, IndexError, TypeError) as error:
        raise ShapeError(
            f"{type(task).__name__}.metrics fails on outputs {outputs.shape} and "
            f"targets {targets.shape}: {error}"
        ) from error
    if task.objective.metric not in metrics:
        raise TaskError(
            f"{type(task).__name__}.metrics gave {', '.join(sorted(metrics))} but the objective is "
            f"{task.objective.metric!r}; return it too"
        )
    return metrics
