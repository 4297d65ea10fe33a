"""What inputs look like on a bad day: with noise on them, or with values missing.

Both are drawn by the seed alone, so that a verdict repeats.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.profile import Profile
from minga.training.schema import Schema

Disturb = Callable[[NDArray[Any]], NDArray[Any]]
"""Disturbs the next rows, shape `(n, ...)`. Cut into pieces or not, rows in the same order are
disturbed alike."""


def noise(schema: Schema, profile: Profile, *, amount: float, seed: int) -> Disturb:
    """Add Gaussian noise to the numbers among inputs; categories stay.

    Args:
        schema: says which columns are numbers.
        profile: of the training data: its deviations are the unit of the noise.
        amount: the noise's deviation, in units of each column's own.
        seed: of the noise.
    """
    scales = amount * np.asarray(
        [
            seen.deviation if column.kind == "number" else 0.0
            for column, seen in zip(schema.columns, profile.inputs, strict=True)
        ]
    )
    generator = np.random.default_rng(seed)

    def disturb(inputs: NDArray[Any]) -> NDArray[Any]:
        if inputs.dtype.kind != "f":
            return inputs
        return (inputs + scales * generator.normal(size=inputs.shape)).astype(inputs.dtype)

    return disturb


def gaps(schema: Schema, profile: Profile, *, share: float, seed: int) -> Disturb:
    """Take values away at random.

    What takes a value's place is what a client would send: NaN in a column that had missing values
    in training, else the column's mean there, or a category's most frequent value.

    Args:
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
    generator = np.random.default_rng(seed)

    def disturb(inputs: NDArray[Any]) -> NDArray[Any]:
        values = fillers if inputs.dtype.kind == "f" else np.nan_to_num(fillers).round()
        is_gone = generator.random(inputs.shape) < share
        return np.where(is_gone, values, inputs).astype(inputs.dtype)

    return disturb


def usual(categories: tuple[float, ...], shares: tuple[float, ...], mean: float) -> float:
    """Give a category's most frequent value, or a number's mean."""
    if len(categories) == len(shares):
        return categories[int(np.argmax(shares))]
    return mean
