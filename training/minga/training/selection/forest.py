"""Isolation forests as a contender, for Tasks that look for anomalies.

Random trees that isolate a row early call it unusual (Liu, Ting, Zhou, "Isolation forest", ICDM
2008); scikit-learn grows them, and they are exported with skl2onnx. The threshold lies where the
Task's share of false alarms in the validation split is reached; it is inside the exported model.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from minga.training.anomalies import AnomalyTask, threshold_of
from minga.training.evaluate import predict
from minga.training.export import OUTPUT
from minga.training.network import build_preparation
from minga.training.selection.graphs import ROWS, SCORES, Part, behind, prepared_by

if TYPE_CHECKING:
    from minga.training.models import Model
    from minga.training.space import Params
    from minga.training.task import Split

FOREST = "isolation-forest"

NUM_TREES = 100
SAMPLE_ROWS = 256
"""Each tree sees so many rows: the paper's figures, at which its scores have settled."""


class IsolationForest:
    """A forest for a Task that looks for anomalies."""

    name = FOREST

    def __init__(self, task: AnomalyTask, params: "Params | None" = None) -> None:
        self._task = task
        self._params = params or {}

    def fit(self, train: "Split", validation: "Split", *, seed: int) -> "Model":
        """Grow the forest on rows that are not known to be anomalies, and choose the threshold."""
        from sklearn.ensemble import IsolationForest as Forest

        torch.manual_seed(seed)
        preparation = prepared_by(build_preparation(self._task, self._params, train))
        rows = predict(preparation, train.inputs)[train.targets < 0.5]
        trees = Forest(
            n_estimators=NUM_TREES, max_samples=min(SAMPLE_ROWS, len(rows)), random_state=seed
        ).fit(rows)
        model = ForestModel(preparation, trees, 0.0, train.inputs[:1])
        scores = model.predict(validation.inputs)
        return model.above(threshold_of(scores, validation.targets, self._task.false_alarms))


class ForestModel:
    """Preparation, forest and threshold; an output above 0 is an anomaly.

    Args:
        preparation: from inputs to rows of floats.
        trees: fitted on these.
        threshold: is taken off the scores.
        example: one input.
    """

    def __init__(
        self, preparation: nn.Module, trees: Any, threshold: float, example: NDArray[Any]
    ) -> None:
        self._preparation = preparation
        self._trees = trees
        self._threshold = np.float32(threshold)
        self._example = example

    def above(self, threshold: float) -> "ForestModel":
        """Give the same forest with another threshold."""
        return ForestModel(self._preparation, self._trees, threshold, self._example)

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Give how unusual each row is, less the threshold, shape `(n,)`."""
        rows = predict(self._preparation, inputs)
        unusual = -self._trees.decision_function(rows)
        return np.asarray(unusual, np.float32) - self._threshold

    def to_onnx(self) -> bytes:
        """Write preparation, forest and threshold as one ONNX model."""
        return behind(self._preparation, self._example, lambda *_: self._part(), shape=())

    def _part(self) -> Part:
        """Sum the depths at which the trees isolate a row, and make the paper's score of it.

        skl2onnx's own converter of isolation forests writes a dozen nodes for each tree, which
        took 40 times as long for one row as this one node for all (2026-11-23).
        """
        usual = len(self._trees.estimators_) * usual_depth(self._trees.max_samples_)
        nodes = [
            helper.make_node(
                "TreeEnsembleRegressor", [ROWS], [SCORES], domain="ai.onnx.ml", **self._depths()
            ),
            helper.make_node("Reshape", [SCORES, "minga_shape"], ["minga_depth"]),
            helper.make_node("Mul", ["minga_depth", "minga_rate"], ["minga_exponent"]),
            helper.make_node("Exp", ["minga_exponent"], ["minga_unusual"]),
            helper.make_node("Sub", ["minga_unusual", "minga_level"], [OUTPUT]),
        ]
        level = float(self._threshold) - float(self._trees.offset_)
        constants = [
            helper.make_tensor("minga_shape", TensorProto.INT64, [1], [-1]),
            helper.make_tensor("minga_rate", TensorProto.FLOAT, [], [-math.log(2) / usual]),
            helper.make_tensor("minga_level", TensorProto.FLOAT, [], [level]),
        ]
        return Part(nodes, constants)

    def _depths(self) -> dict[str, Any]:
        """Give the attributes of one node for all trees, whose leaves hold their depths."""
        from skl2onnx.common.tree_ensemble import (
            add_tree_to_attribute_pairs,
            get_default_tree_regressor_attribute_pairs,
        )

        found: dict[str, Any] = get_default_tree_regressor_attribute_pairs()
        found["n_targets"] = 1
        weights: list[float] = []
        for number, tree in enumerate(one.tree_ for one in self._trees.estimators_):
            add_tree_to_attribute_pairs(
                found, False, tree, number, 1.0, 0, False, True, dtype=np.float32
            )
            weights += _leaf_depths(tree)
        leaves = zip(found["target_treeids"], found["target_nodeids"], strict=True)
        offsets = np.cumsum([0, *(one.tree_.node_count for one in self._trees.estimators_)])
        found["target_weights"] = [weights[offsets[tree] + node] for tree, node in leaves]
        return found


def usual_depth(num_rows: int) -> float:
    """Give the mean depth of a row in a random tree over so many rows (the paper's equation 1)."""
    if num_rows <= 2:
        return float(num_rows == 2)
    harmonic = math.log(num_rows - 1) + np.euler_gamma
    return float(2 * harmonic - 2 * (num_rows - 1) / num_rows)


def _leaf_depths(tree: Any) -> list[float]:
    """Give each node's depth, and what a leaf's rows would still take to be isolated."""
    depths = np.zeros(tree.node_count)
    for node in range(tree.node_count):  # parents come before their children
        for child in (tree.children_left[node], tree.children_right[node]):
            if child >= 0:
                depths[child] = depths[node] + 1
    return [d + usual_depth(int(n)) for d, n in zip(depths, tree.n_node_samples, strict=True)]
