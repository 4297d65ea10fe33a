"""What a Task's raw outputs are, so that a model that knows no loss can give the same.

Scikit-learn's trees learn from targets, not from a Task's loss. What they find must become what
`Task.metrics` takes: numbers, logits, probabilities. The Task's own model, untrained, shows the
shape and whether outputs are probabilities; where that leaves two readings, the loss decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

from minga.training.errors import TaskError
from minga.training.evaluate import predict
from minga.training.network import batch_of, build_network, one_thread
from minga.training.space import ARCHITECTURE, OWN
from minga.training.task import Split, Task

NUM_SHOWN = 256
"""Examples on which the Task's own model shows what it gives."""


class Kind(Enum):
    """What is learned."""

    NUMBER = "number"
    BINARY = "binary"
    CLASSES = "classes"


class Link(Enum):
    """What becomes of trees' raw scores: nothing, or probabilities, or their logarithms."""

    RAW = "raw"
    PROBABILITY = "probability"
    LOGARITHM = "logarithm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a Task's model gives for one example.

    Attributes:
        kind: number, the positive class of two, or one of several classes.
        shape: of one output; `()`, `(1,)` or `(classes,)`.
        links: the readings that are possible.
    """

    kind: Kind
    shape: tuple[int, ...]
    links: tuple[Link, ...]


def answer_of(task: Task, train: Split) -> Answer:
    """Look at targets and at the untrained own model's outputs.

    Raises:
        TaskError: the outputs are nothing that trees can give.
    """
    network = build_network(task, {**task.defaults, ARCHITECTURE: OWN}, train, seed=0)
    outputs = predict(network, train.inputs[:NUM_SHOWN])
    shape, targets = outputs.shape[1:], train.targets.reshape(len(train), -1)
    if targets.shape[1] != 1 or len(shape) > 1:
        raise TaskError(
            f"trees give one number, or one for each class; the Task's targets have shape "
            f"{train.targets.shape[1:]} and its outputs {shape}"
        )
    values = np.unique(targets[np.isfinite(targets)])
    if shape in ((), (1,)):
        if not np.array_equal(values, [0, 1]):
            return Answer(kind=Kind.NUMBER, shape=shape, links=(Link.RAW,))
        is_share = bool(np.all((outputs >= 0) & (outputs <= 1)))
        links = (Link.RAW, Link.PROBABILITY) if is_share else (Link.RAW,)
        return Answer(kind=Kind.BINARY, shape=shape, links=links)
    if not np.array_equal(values, np.arange(shape[0])):
        raise TaskError(
            f"the Task gives {shape[0]} outputs, and its training targets are not the classes 0 to "
            f"{shape[0] - 1}, so that trees cannot tell them apart"
        )
    return Answer(kind=Kind.CLASSES, shape=shape, links=(_link_of_classes(outputs),))


def linked(link: Link, raw: NDArray[Any], answer: Answer) -> NDArray[np.float32]:
    """Make outputs of raw scores, shape `(n, 1)` or `(n, classes)`."""
    if answer.kind is Kind.CLASSES:
        become: Mapping[Link, Any] = {Link.PROBABILITY: softmax, Link.LOGARITHM: log_softmax}
        found = become[link](raw, axis=1) if link in become else raw
    else:
        found = expit(raw) if link is Link.PROBABILITY else raw
    return np.asarray(found, np.float32).reshape(-1, *answer.shape)


def choose_link(task: Task, answer: Answer, raw: NDArray[Any], split: Split) -> Link:
    """Take the reading with which the Task's loss is least.

    Args:
        task: has the loss.
        answer: has the readings.
        raw: scores of the examples.
        split: the examples.

    Raises:
        TaskError: the loss takes none of them.
    """
    losses = {link: _loss(task, linked(link, raw, answer), split) for link in answer.links}
    best = min(answer.links, key=lambda link: losses[link])
    if not np.isfinite(losses[best]):
        raise TaskError(f"{type(task).__name__}.loss takes nothing that trees can give")
    return best


def _loss(task: Task, outputs: NDArray[np.float32], split: Split) -> float:
    try:
        with torch.inference_mode(), one_thread():
            loss = float(task.loss(torch.from_numpy(outputs), batch_of(split).targets))
    except (RuntimeError, ValueError, IndexError):
        return float("inf")
    return loss if np.isfinite(loss) else float("inf")


def _link_of_classes(outputs: NDArray[Any]) -> Link:
    """Tell logits from probabilities and their logarithms by what they add up to."""
    if np.allclose(np.exp(outputs).sum(axis=1), 1, atol=1e-3):
        return Link.LOGARITHM
    if np.all(outputs >= 0) and np.allclose(outputs.sum(axis=1), 1, atol=1e-3):
        return Link.PROBABILITY
    return Link.RAW
