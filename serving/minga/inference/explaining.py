"""Why a model answered so: what each feature adds, by occlusion.

A feature's attribution is the output minus the output with that feature alone at its baseline
(M. D. Zeiler, R. Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014; for
tables: M. Robnik-Sikonja, I. Kononenko: Explaining Classifications for Individual Instances,
IEEE TKDE 2008). It needs nothing of the model but answers, is exact for what it says, and does
not share an interaction of features out: attributions need not add up to the output.

It costs one more row per feature. The baseline is the mean of the training data, where the
model's source knows it, or what the request says.
"""

from collections.abc import Iterator, Mapping
from reprlib import repr as excerpt  # a caller must not choose a message's length
from typing import Any, Final

import numpy as np

from minga.inference.engine import OnnxModel
from minga.inference.errors import BadRequestError
from minga.inference.tensors import Array

MAX_ROWS: Final = 16_384
"""How many rows a model may compute for one explanation."""


def baseline_of(model: OnnxModel, parameters: Mapping[str, Any], rows: Array) -> Array:
    """Give the value of each feature that stands for its absence.

    Args:
        model: the model.
        parameters: the request's; `baseline` is a list with a number per feature.
        rows: the model's one input, `(n, features)`.

    Raises:
        BadRequestError: neither the request nor the model's source has a fitting one.
    """
    given = parameters.get("baseline", list(model.ref.baseline))
    num_features = rows.shape[1]
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


def occluded(rows: Array, baseline: Array, *, max_rows: int) -> Iterator[Array]:
    """Give the rows as they are and then with each feature at its baseline, in pieces.

    Args:
        rows: `(n, features)`.
        baseline: `(features,)`.
        max_rows: the most rows of a piece.
    """
    variants = np.repeat(rows[None], rows.shape[1] + 1, axis=0)
    for feature, value in enumerate(baseline):
        variants[feature + 1, :, feature] = value
    flat = variants.reshape(-1, rows.shape[1])
    for start in range(0, len(flat), max_rows):
        yield flat[start : start + max_rows]


def attributions(outputs: Array, *, num_rows: int) -> Array:
    """Give what each feature adds to an output.

    Args:
        outputs: of what `occluded` gave, joined: `((features + 1) * n, ...)`.
        num_rows: n.

    Returns:
        `(n, features, ...)`, FP64.
    """
    variants = outputs.astype(np.float64).reshape(-1, num_rows, *outputs.shape[1:])
    return np.ascontiguousarray(np.moveaxis(variants[0] - variants[1:], 0, 1))
