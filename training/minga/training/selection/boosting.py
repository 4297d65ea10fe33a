"""Gradient boosted trees as a contender: scikit-learn's, exported by skl2onnx.

Histogram-based boosting (Friedman, Annals of Statistics 2001; Ke et al., NeurIPS 2017) with early
stopping on the validation split. Trees split what the Task's preparation gives, on values that
float32 holds exactly, so that the exported model takes the same branches.
"""

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from minga.training.evaluate import predict
from minga.training.export import OUTPUT
from minga.training.models import Model
from minga.training.network import build_preparation
from minga.training.selection.graphs import (
    SCORES,
    Part,
    behind,
    converted,
    exact_thresholds,
    prepared_by,
)
from minga.training.selection.links import (
    Answer,
    Kind,
    Link,
    answer_of,
    choose_link,
    linked,
)
from minga.training.space import Params
from minga.training.task import Split, Task

BOOSTING = "boosting"

MAX_ITERATIONS = 300
PATIENCE = 20
"""Iterations without a gain on the validation split, after which boosting stops."""


class Boosting:
    """Boosted trees for a Task with one target: a number, or a class."""

    name = BOOSTING

    def __init__(self, task: Task, params: Params | None = None) -> None:
        self._task = task
        self._params = params or {}

    def fit(self, train: Split, validation: Split, *, seed: int) -> Model:
        """Boost trees until the validation split gains nothing.

        Raises:
            TaskError: the Task's outputs or loss are nothing that trees can serve.
        """
        answer = answer_of(self._task, train)
        torch.manual_seed(seed)
        preparation = prepared_by(build_preparation(self._task, self._params, train))
        trees = grow(
            answer.kind,
            predict(preparation, train.inputs),
            train.targets,
            predict(preparation, validation.inputs),
            validation.targets,
            seed=seed,
        )
        model = BoostedModel(preparation, trees, answer, Link.RAW, train.inputs[:1])
        raw = model.scores(validation.inputs)
        return model.read_as(choose_link(self._task, answer, raw, validation))


class BoostedModel:
    """Preparation and boosted trees.

    Args:
        preparation: from inputs to rows of floats.
        trees: fitted on these.
        answer: what the Task gives.
        link: what becomes of the trees' scores.
        example: one input.
    """

    def __init__(
        self,
        preparation: nn.Module,
        trees: Any,
        answer: Answer,
        link: Link,
        example: NDArray[Any],
    ) -> None:
        self._preparation = preparation
        self._trees = trees
        self._answer = answer
        self._link = link
        self._example = example

    def read_as(self, link: Link) -> "BoostedModel":
        """Give the same trees with another link."""
        return BoostedModel(self._preparation, self._trees, self._answer, link, self._example)

    def scores(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """Give the trees' raw scores, shape `(n, 1)` or `(n, classes)`."""
        return scores_of(self._trees, predict(self._preparation, inputs))

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Give outputs as the Task's own model would."""
        return linked(self._link, self.scores(inputs), self._answer)

    def to_onnx(self) -> bytes:
        """Write preparation, trees and link as one ONNX model."""
        is_number = self._answer.kind is Kind.NUMBER

        def make(width: int, version: int) -> Part:
            trees = converted(
                self._trees,
                width,
                version,
                options={} if is_number else {"raw_scores": True, "zipmap": False},
                scores="variable" if is_number else "probabilities",
            )
            numbers = [_integers("minga_last", [-1]), _integers("minga_shape", self._shape)]
            return Part([*trees.nodes, *self._tail()], [*trees.constants, *numbers])

        return behind(self._preparation, self._example, make, shape=self._answer.shape)

    @property
    def _shape(self) -> list[int]:
        return [-1, *self._answer.shape]

    def _tail(self) -> list[onnx.NodeProto]:
        """Take the positive class's score of two, link it, and bring it into its shape."""
        names = iter(["minga_score", "minga_linked"])
        nodes, last = [], SCORES
        if self._answer.kind is Kind.BINARY:
            nodes.append(helper.make_node("Gather", [last, "minga_last"], [next(names)], axis=1))
            last = nodes[-1].output[0]
        if self._link is not Link.RAW:
            is_one = self._answer.kind is Kind.BINARY
            of_classes = "Softmax" if self._link is Link.PROBABILITY else "LogSoftmax"
            operator = "Sigmoid" if is_one else of_classes
            options = {} if is_one else {"axis": 1}
            nodes.append(helper.make_node(operator, [last], [next(names)], **options))
            last = nodes[-1].output[0]
        return [*nodes, helper.make_node("Reshape", [last, "minga_shape"], [OUTPUT])]


def grow(
    kind: Kind,
    rows: NDArray[Any],
    targets: NDArray[Any],
    other_rows: NDArray[Any],
    other_targets: NDArray[Any],
    *,
    seed: int,
) -> Any:
    """Boost trees of scikit-learn until other rows gain nothing.

    Args:
        kind: of the targets.
        rows: to learn from, shape `(n, columns)`; NaN is a value of its own.
        targets: of the rows.
        other_rows: to stop by.
        other_targets: of these.
        seed: of what is drawn.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    is_number = kind is Kind.NUMBER
    make = HistGradientBoostingRegressor if is_number else HistGradientBoostingClassifier
    wanted = np.float64 if is_number else np.int64
    trees = make(
        max_iter=MAX_ITERATIONS,
        early_stopping=True,
        n_iter_no_change=PATIENCE,
        random_state=seed,
    )
    # Two threads that wait for each other beside other work were ten times slower than one.
    with threadpool_limits(1):
        trees.fit(
            rows,
            targets.reshape(len(rows)).astype(wanted),
            X_val=other_rows,
            y_val=other_targets.reshape(len(other_rows)).astype(wanted),
        )
    for stage in trees._predictors:
        for tree in stage:
            tree.nodes["num_threshold"] = exact_thresholds(tree.nodes["num_threshold"])
    return trees


def scores_of(trees: Any, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Give raw scores, shape `(n, 1)` or `(n, classes)`."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        decide = getattr(trees, "decision_function", trees.predict)
        return np.asarray(decide(rows), np.float64).reshape(len(rows), -1)


def _integers(name: str, values: list[int]) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
