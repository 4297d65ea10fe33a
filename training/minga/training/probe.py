"""A try of everything once, on a few examples, before hours are spent on a typing error."""

import torch

from minga.training.errors import DataError, ShapeError
from minga.training.evaluate import measure, predict
from minga.training.network import batch_of, build_network, one_thread
from minga.training.space import Params, is_network
from minga.training.task import Split, Splits, Task

STEP_EXAMPLES = 4
"""Enough that a batch axis cannot be mistaken for another."""

METRIC_EXAMPLES = 1000
"""Enough that metrics find what they need, such as examples of every class."""


def probe(task: Task, params: Params, splits: Splits) -> None:
    """Try one training step and the metrics; of what is no network, nothing.

    Raises:
        ShapeError: forward, loss or metrics do not take these shapes.
        TaskError: the metrics lack the objective's.
        DataError: the loss of the untrained network is not finite.
    """
    if not is_network(params):
        return
    network = build_network(task, params, splits.train, seed=0)
    few = _first(splits.train, STEP_EXAMPLES)
    shapes = f"inputs {few.inputs.shape} {few.inputs.dtype}, targets {few.targets.shape}"
    try:
        with one_thread():
            loss = task.step(network, batch_of(few)).detach()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ShapeError(
            f"{type(task).__name__}: one training step fails on {shapes}: "
            f"{str(error).strip().splitlines()[0]}; make model, loss and data agree"
        ) from error
    if loss.ndim != 0:
        raise ShapeError(
            f"{type(task).__name__}.loss gave shape {tuple(loss.shape)}; it must be one number, "
            "for instance its mean"
        )
    if not torch.isfinite(loss):
        raise DataError(
            f"the untrained network's loss is {float(loss)} on {shapes}; are values missing?"
        )
    more = _first(splits.validation, METRIC_EXAMPLES)
    measure(task, predict(network, more.inputs), more.targets)


def _first(split: Split, num_examples: int) -> Split:
    return Split(inputs=split.inputs[:num_examples], targets=split.targets[:num_examples])
