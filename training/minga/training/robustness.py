"""What inputs look like on a bad day: with noise on them, or with values missing.

Both are drawn by the seed alone, so that a verdict repeats.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.profile import Profile
from minga.training.schema import Schema


def with_noise(
    inputs: NDArray[Any], schema: Schema, profile: Profile, *, amount: float, seed: int
) -> NDArray[Any]:
    """Add Gaussian noise to the numbers among the inputs; categories stay.

    Args:
        inputs: shape `(n, ...)`.
        schema: says which columns are numbers.
        profile: of the training data: its deviations are the unit of the noise.
        amount: the noise's deviation, in units of each column's own.
        seed: of the noise.
    """
    if inputs.dtype.kind != "f":
        return inputs
    scales = [
        seen.deviation if column.kind == "number" else 0.0
        for column, seen in zip(schema.columns, profile.inputs, strict=True)
    ]
    noise = np.random.default_rng(seed).normal(size=inputs.shape)
    return (inputs + amount * np.asarray(scales) * noise).astype(inputs.dtype)


def with_gaps(
    inputs: NDArray[Any], schema: Schema, profile: Profile, *, share: float, seed: int
) -> NDArray[Any]:
    """Take values away at random.

    What takes a value's place is what a client would send: NaN in a column that had missing values
    in training, else the column's mean there, or a category's most frequent value.

    Args:
        inputs: shape `(n, ...)`.
        schema: says which columns may miss values.
        profile: of the training data.
        share: of the values that are taken away.
        seed: of the choice.
    """
    fillers = np.asarray(
        [
            np.nan if column.missing > 0 else usual(column.categories, seen.shares, seen.mean)
            for column, seen in zip(schema.columns, profile.inputs, strict=True)
        ]
    )
    if inputs.dtype.kind != "f":
        fillers = np.nan_to_num(fillers).round()
    is_gone = np.random.default_rng(seed).random(inputs.shape) < share
    return np.where(is_gone, fillers, inputs).astype(inputs.dtype)


def usual(categories: tuple[float, ...], shares: tuple[float, ...], mean: float) -> float:
    """Give a category's most frequent value, or a number's mean."""
    if len(categories) == len(shares):
        return categories[int(np.argmax(shares))]
    return mean
