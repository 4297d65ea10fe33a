"""Why a model answered so, asked of the model alone: what changes when a value is taken away.

Each value of a row is replaced by the baseline's, and the answer's change is the value's share in
it (occlusion: Zeiler and Fergus, ECCV 2014; on tables, Robnik-Sikonja and Kononenko, TKDE 2008). It
needs nothing but predictions, so it works on a device and for any model; values that matter only
together are told apart badly, since each is taken away alone.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from minga.inference.errors import BadRequestError
from minga.inference.tensors import Array

Predict = Callable[[Array], Array]
"""From inputs of shape `(n, ...)` to outputs of shape `(n,)` or `(n, k)`."""

PATCHES = 8
"""Inputs with more than one axis are occluded in so many patches along each of the last two."""

BATCH_ROWS = 4096


def occlude(predict: Predict, rows: Array, baseline: Array) -> Array:
    """Attribute answers to the values of their rows.

    Args:
        predict: the model.
        rows: shape `(n, ...)`.
        baseline: what stands for a missing value; of one row's shape, or a single number.

    Returns:
        the answer's change by each value, of the shape of `rows`; positive where the value raised
        it. Where a model gives several outputs, the answer is each row's largest. All values of an
        image's patch share the patch's.

    Raises:
        BadRequestError: the outputs are no numbers of shape `(n,)` or `(n, k)`.
    """
    base = np.broadcast_to(np.asarray(baseline, rows.dtype), rows.shape[1:])
    outputs = _table(predict(rows), len(rows))
    answer = outputs.argmax(axis=1)
    picked = np.arange(len(rows))
    shares = np.zeros(rows.shape, np.float64)
    for region in _regions(rows.shape[1:]):
        occluded = rows.copy()
        occluded[(slice(None), *region)] = base[region]
        without = _table(_in_batches(predict, occluded), len(rows))
        change = outputs[picked, answer] - without[picked, answer]
        shares[(slice(None), *region)] = change.reshape(-1, *[1] * len(shares[0][region].shape))
    return shares


def _regions(shape: tuple[int, ...]) -> list[tuple[slice | int, ...]]:
    """Give the parts that are taken away together: each column, or each patch of an image."""
    if len(shape) <= 1:
        return [(index,) for index in range(shape[0])] if shape else [()]
    *front, height, width = shape
    rows, columns = (np.linspace(0, n, min(PATCHES, n) + 1).astype(int) for n in (height, width))
    whole = (slice(None),) * len(front)
    return [
        (*whole, slice(top, bottom), slice(left, right))
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]


def _in_batches(predict: Predict, rows: Array) -> Array:
    parts = [predict(rows[n : n + BATCH_ROWS]) for n in range(0, len(rows), BATCH_ROWS)]
    return np.concatenate(parts)


def _table(outputs: Array, num_rows: int) -> Array:
    if outputs.dtype.kind not in "fiub" or outputs.ndim not in (1, 2) or len(outputs) != num_rows:
        raise BadRequestError(
            f"outputs of {outputs.dtype} and shape {outputs.shape} cannot be explained; "
            "the model must give one number, or one for each class, for each row"
        )
    return outputs.reshape(num_rows, -1).astype(np.float64)
