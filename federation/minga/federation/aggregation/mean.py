"""The plain server step: the global model moves along the mean update."""

import numpy as np
from numpy.typing import NDArray


def apply_mean(
    values: NDArray[np.float32], mean_delta: NDArray[np.float32], learning_rate: float = 1.0
) -> NDArray[np.float32]:
    """Move a model by the mean of its devices' updates.

    With a learning rate of 1 this is federated averaging (McMahan et al., AISTATS 2017): the
    result is the weighted mean of the devices' own models.

    Args:
        values: The global model, float32, shape `(n,)`; not changed.
        mean_delta: Weighted mean of the updates, float32, shape `(n,)`.
        learning_rate: The step's length, usually from 0 to 1.

    Returns:
        The next global model, float32, shape `(n,)`.

    Raises:
        ValueError: the shapes differ (nothing is broadcast), or the result is not finite.
    """
    if values.ndim != 1 or values.shape != mean_delta.shape:
        raise ValueError(
            f"the mean update has shape {mean_delta.shape}, the model {values.shape}; "
            "both must be vectors of one length"
        )
    moved = values + np.float32(learning_rate) * mean_delta
    if not np.isfinite(moved).all():
        raise ValueError(
            "the step leads to NaN or infinity; lower the server's learning rate, or start from a "
            "finite model"
        )
    return moved
