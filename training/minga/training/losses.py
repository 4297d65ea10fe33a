"""Grows the tree that tells a model's errors; see `minga.inference.monitor.losses`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.inference.monitor.losses import NO_LEAF

MAX_LEAVES = 16
MIN_ROWS = 200
"""Fewer held-out rows say too little about where errors are large."""

MAX_ROWS = 50_000
LEAF_SHARE = 0.03
"""Of the rows that grow the tree a leaf has at least so many: a mean of fewer is luck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """A tree of losses as plain values, and the share of the held-out rows in each leaf."""

    tree: dict[str, Any]
    shares: list[float]
    num_examples: int


def grow_losses(rows: NDArray[np.float64], errors: NDArray[np.float64]) -> Losses | None:
    """Learn where a model's errors are large.

    Args:
        rows: of the test split, as `minga.inference.monitor.sketch.loss_rows` gives them, shape
            `(columns + 1, n)`.
        errors: absolute ones, shape `(n,)`.

    Returns:
        None if there are too few rows, or if errors are much alike everywhere.
    """
    from sklearn.tree import DecisionTreeRegressor

    if len(errors) < MIN_ROWS:
        return None
    order = np.random.default_rng(0).permutation(len(errors))
    growing, telling = np.array_split(order, 2)
    # What is compared at serving time are float32 inputs too.
    table = rows.T.astype(np.float32)
    grown = DecisionTreeRegressor(
        max_leaf_nodes=MAX_LEAVES,
        min_samples_leaf=max(round(LEAF_SHARE * len(growing)), 2),
        random_state=0,
    ).fit(table[growing], errors[growing])
    tree = grown.tree_
    is_leaf = tree.children_left < 0
    leaves = np.where(is_leaf, np.cumsum(is_leaf) - 1, NO_LEAF)
    found = leaves[grown.apply(table[telling])]
    counts = np.bincount(found, minlength=int(is_leaf.sum()))
    if len(counts) < 2 or counts.min() < 2:
        return None
    told = [errors[telling][found == leaf] for leaf in range(len(counts))]
    return Losses(
        tree={
            "columns": np.where(is_leaf, 0, tree.feature).tolist(),
            "thresholds": np.where(is_leaf, 0.0, tree.threshold).tolist(),
            "left": np.where(is_leaf, 0, tree.children_left).tolist(),
            "right": np.where(is_leaf, 0, tree.children_right).tolist(),
            "leaves": leaves.tolist(),
            "errors": [float(part.mean()) for part in told],
            "deviations": [float(part.std(ddof=1)) for part in told],
            "counts": counts.tolist(),
        },
        shares=(counts / counts.sum()).tolist(),
        num_examples=len(telling),
    )
