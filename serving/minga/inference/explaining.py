"""Why a model answered so: what each feature adds, by occlusion.

A feature's attribution is the output minus the output with that feature alone at its baseline
(M. D. Zeiler, R. Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014; for
tables: M. Robnik-Sikonja, I. Kononenko: Explaining Classifications for Individual Instances,
IEEE TKDE 2008). It needs nothing of the model but answers, is exact for what it says, and does
not share an interaction of features out: attributions need not add up to the output.

It costs one more row per feature. The baseline is what the request says, or else the mean of the
training data, where the model's source knows it or its file carries it (`monitor.reference`).
Servers attribute every output (`occluded`, `attributions`); `occlude` does the rest for whoever
holds a model: `minga explain`, a device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from reprlib import repr as excerpt  # a caller must not choose a message's length
from typing import Any, Final

import numpy as np

from minga.inference.engine import OnnxModel
from minga.inference.errors import BadRequestError
from minga.inference.monitor.reference import Role
from minga.inference.tensors import Array

Predict = Callable[[Array], Array]
"""From inputs of shape `(n, ...)` to outputs of shape `(n,)` or `(n, k)`."""

Region = tuple[slice, ...]
"""A part of a row that is taken away as one."""

PATCHES: Final = 8
"""Rows with more than one axis lose so many patches along each of the last two, one by one."""

BATCH_ROWS: Final = 4096

MAX_ROWS: Final = 16_384
"""How many rows a model may compute for one explanation."""


def baseline_of(model: OnnxModel, parameters: Mapping[str, Any], rows: Array) -> Array:
    """Give the value of each feature that stands for its absence.

    Args:
        model: the model.
        parameters: the request's; `baseline` is a list with a number per feature.
        rows: the model's one input, `(n, features)`.

    Raises:
        BadRequestError: neither the request, the model's source nor its file has a fitting one.
    """
    num_features = rows.shape[1]
    given = parameters.get("baseline", list(model.ref.baseline) or _means(model, num_features))
    if not given:
        raise BadRequestError(
            f"model {model.ref} has no reference profile; "
            f"give {num_features} numbers as parameters.baseline"
        )
    if type(given) is not list or not all(type(value) in (int, float) for value in given):
        raise BadRequestError(f"baseline must be a list of numbers, not {excerpt(given)}")
    if len(given) != num_features:
        raise BadRequestError(f"baseline has {len(given)} numbers for {num_features} features")
    if rows.dtype.kind in "iu":
        given = [round(value) for value in given]
    try:
        with np.errstate(over="raise"):
            return np.array(given).astype(rows.dtype, casting="unsafe")
    except (FloatingPointError, OverflowError):
        raise BadRequestError(f"a number of the baseline is no {rows.dtype}") from None


def _means(model: OnnxModel, num_features: int) -> list[float]:
    """Give what the model's file says of its features; nothing unless it is of each of them."""
    columns = model.reference.of_role(Role.INPUT) if model.reference else ()
    return [column.mean for column in columns] if len(columns) == num_features else []


def rows_of(model: OnnxModel, inputs: Mapping[str, Array]) -> Array:
    """Give the rows to explain.

    Raises:
        BadRequestError: the model is not one of a table of numbers, or the rows are too many.
    """
    spec = model.inputs[0]
    is_table = len(model.inputs) == 1 and len(spec.shape) == 2 and spec.datatype.dtype.kind in "fiu"
    if not is_table or not model.is_rowwise:
        raise BadRequestError(
            f"model {model.ref} does not take one table of numbers, row by row; "
            "only such models can be explained"
        )
    rows = inputs[spec.name]
    cost = len(rows) * (rows.shape[1] + 1)
    if cost > MAX_ROWS:
        raise BadRequestError(
            f"explaining {len(rows)} rows of {rows.shape[1]} features takes {cost} rows, "
            f"over the limit of {MAX_ROWS}; ask for fewer rows at once"
        )
    return rows


def occlude(predict: Predict, rows: Array, baseline: Array) -> Array:
    """Attribute each row's own answer to its values: what a caller without a server does.

    Args:
        predict: the model.
        rows: `(n, ...)`; more axes than one are taken away in patches of the last two.
        baseline: what stands for absence; of one row's shape, or a single number.

    Returns:
        What each value adds, of the shape of `rows`. Where a model gives several outputs, the
        answer is each row's largest. All values of a patch have what the patch adds.

    Raises:
        BadRequestError: the outputs are no numbers of shape `(n,)` or `(n, k)`.
    """
    base = np.broadcast_to(np.asarray(baseline, rows.dtype), rows.shape[1:])
    regions = regions_of(rows.shape[1:])
    shares = np.zeros(rows.shape, np.float64)
    step = max(BATCH_ROWS // (len(regions) + 1), 1)
    for start in range(0, len(rows), step):
        chunk, share = rows[start : start + step], shares[start : start + step]
        pieces = occluded(chunk, base, max_rows=BATCH_ROWS, regions=regions)
        outputs = np.concatenate([_table(predict(piece), len(piece)) for piece in pieces])
        picked, answer = np.arange(len(chunk)), outputs[: len(chunk)].argmax(axis=1)
        added = attributions(outputs, num_rows=len(chunk))[picked, :, answer]
        for place, region in enumerate(regions):
            part = share[slice(None), *region]
            part[...] = added[:, place].reshape(-1, *[1] * (part.ndim - 1))
    return shares


def regions_of(shape: tuple[int, ...]) -> Sequence[Region]:
    """Give the parts of a row that are taken away together: each column, or each patch."""
    if len(shape) <= 1:
        return [(slice(index, index + 1),) for index in range(shape[0])] if shape else [()]
    *front, height, width = shape
    tops, lefts = (np.linspace(0, n, min(PATCHES, n) + 1).astype(int) for n in (height, width))
    whole = (slice(None),) * len(front)
    return [
        (*whole, slice(top, bottom), slice(left, right))
        for top, bottom in pairwise(tops)
        for left, right in pairwise(lefts)
    ]


def occluded(
    rows: Array, baseline: Array, *, max_rows: int, regions: Sequence[Region] = ()
) -> Iterator[Array]:
    """Give the rows as they are and then with each region at its baseline, in pieces.

    No more than a piece is in memory: a row of many features has as many variants as features.

    Args:
        rows: `(n, ...)`.
        baseline: of one row's shape.
        max_rows: the most rows of a piece.
        regions: of a row; each of its columns if none is given.
    """
    regions = regions or regions_of(rows.shape[1:])
    num_rows, total = len(rows), len(rows) * (len(regions) + 1)
    for start in range(0, total, max_rows):
        stop = min(start + max_rows, total)
        piece = rows[np.arange(start, stop) % num_rows]
        for variant in range(max(start // num_rows, 1), -(-stop // num_rows)):
            own = piece[max(variant * num_rows - start, 0) : (variant + 1) * num_rows - start]
            region = regions[variant - 1]
            own[slice(None), *region] = baseline[region]
        yield piece


def attributions(outputs: Array, *, num_rows: int) -> Array:
    """Give what each region adds to an output.

    Args:
        outputs: of what `occluded` gave, joined: `((regions + 1) * n, ...)`.
        num_rows: n.

    Returns:
        `(n, regions, ...)`, FP64.
    """
    variants = outputs.astype(np.float64).reshape(-1, num_rows, *outputs.shape[1:])
    return np.ascontiguousarray(np.moveaxis(variants[0] - variants[1:], 0, 1))


def _table(outputs: Array, num_rows: int) -> Array:
    if outputs.dtype.kind not in "fiub" or outputs.ndim not in (1, 2) or len(outputs) != num_rows:
        raise BadRequestError(
            f"outputs of {outputs.dtype} and shape {outputs.shape} cannot be explained; "
            "the model must give one number, or one for each class, for each row"
        )
    return outputs.reshape(num_rows, -1).astype(np.float64)
