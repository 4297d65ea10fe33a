"""How wrong a model that answers numbers is likely to be, row by row, without labels.

This is direct loss estimation (DLE, of NannyML's documentation since version 0.6, 2022): a second
model has learned on held-out rows how large the first one's absolute errors are, from the inputs
and the answer; the mean of what it says about a window is what the mean absolute error should be
there. It sees what changed in the inputs, and cannot see that the right answer to one has changed.

The second model is one regression tree (Breiman, Friedman, Olshen and Stone, "Classification and
regression trees", 1984). Its leaves are bins: a window is the number of its rows in each, and such
counts add up over replicas like all others. The tree is honest (Athey and Imbens, PNAS 2016): one
half of the test split has grown it, the other half says what the errors in its leaves are.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from minga.inference.monitor.indices import Counts, Floats

NO_LEAF = -1
MAX_NODES = 255
"""In a tree; a file that has more is none of ours."""


@dataclass(frozen=True, eq=False)
class LossTree:
    """A tree over rows of the inputs' columns and the answer.

    Attributes:
        columns: of each node, whose value decides; the answer comes after the inputs.
        thresholds: of each node; a row goes left if its value is at most this.
        left: each node's child for these rows, a later node.
        right: each node's other child, a later node.
        leaves: of each node its number as a leaf, or `NO_LEAF`.
        errors: mean absolute error in each leaf.
        deviations: standard deviation of the absolute errors in each leaf.
        counts: how many held-out rows these figures of a leaf come from, at least 1.
    """

    columns: tuple[int, ...]
    thresholds: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    leaves: tuple[int, ...]
    errors: tuple[float, ...]
    deviations: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of_json(cls, given: dict[str, Any], num_columns: int) -> Self:
        """Read what training wrote.

        Args:
            given: plain values, by the attributes' names.
            num_columns: of the rows: the inputs and the answer.

        Raises:
            ValueError: it is no such tree.
        """
        tree = cls(**{name: tuple(values) for name, values in given.items()})
        size, num_leaves = len(tree.leaves), len(tree.errors)
        nodes = (tree.columns, tree.thresholds, tree.left, tree.right)
        is_sound = (
            0 < size <= MAX_NODES
            and all(len(part) == size for part in nodes)
            and len(tree.deviations) == len(tree.counts) == num_leaves
            and sorted(leaf for leaf in tree.leaves if leaf != NO_LEAF) == list(range(num_leaves))
            and all(count >= 1 for count in tree.counts)
            and all(tree._is_sound(node, num_columns) for node in range(size))
        )
        if not is_sound:
            raise ValueError("the tree of losses is none")
        return tree

    def _is_sound(self, node: int, num_columns: int) -> bool:
        if self.leaves[node] != NO_LEAF:
            return True
        children = (self.left[node], self.right[node])
        return 0 <= self.columns[node] < num_columns and all(
            node < child < len(self.leaves) for child in children
        )

    def leaf_of(self, rows: Floats) -> Floats:
        """Give the leaf of each row, shape `(n,)`, for a table of shape `(columns, n)`."""
        columns, thresholds, left, right, leaves = self._arrays
        place = np.zeros(rows.shape[1], np.int64)
        each = np.arange(rows.shape[1])
        while (is_inner := leaves[place] == NO_LEAF).any():
            values = rows[columns[place], each]
            child = np.where(values <= thresholds[place], left[place], right[place])
            place = np.where(is_inner, child, place)
        found: Floats = leaves[place].astype(np.float64)
        return found

    @cached_property
    def _arrays(self) -> tuple[Any, Any, Any, Any, Any]:
        leaves = np.asarray(self.leaves)
        # A leaf looks at column 0, which there always is, and stays where it is.
        columns = np.where(leaves == NO_LEAF, self.columns, 0)
        rest = (np.asarray(part) for part in (self.thresholds, self.left, self.right))
        thresholds, left, right = rest
        return columns, thresholds, left, right, leaves

    def expected(self, counts: Counts, shares: Floats) -> tuple[float, float, float]:
        """Compare a window with the test split.

        Args:
            counts: of the window's rows by leaves, at least one row.
            shares: of the test split's rows.

        Returns:
            the mean absolute error to be expected, that of the test split, and the standard
            deviation of their difference by luck: which rows came into either, and how well the
            errors of the leaves are known that have more rows or fewer now.
        """
        errors, deviations = np.asarray(self.errors), np.asarray(self.deviations)
        num_known = np.asarray(self.counts, np.float64)
        now = counts / counts.sum()
        value, usual = float(now @ errors), float(shares @ errors)
        spread = float(shares @ (errors - usual) ** 2)
        luck = spread * (1 / counts.sum() + 1 / num_known.sum())
        unsure = float((now - shares) ** 2 @ (deviations**2 / num_known))
        return value, usual, math.sqrt(luck + unsure)
