"""What a Flower user has before meeting Minga: a linear model by hand, one site's data, training.

Eleven arrays, so that an order by names ("10" before "2") would show.
"""

import numpy as np

NUM_LAYERS = 11


def load_data(partition_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one site's inputs (n, 4) and targets (n,); sites have unlike data and counts."""
    rng = np.random.default_rng(partition_id)
    inputs = rng.normal(size=(20 + 10 * partition_id, 4))
    return inputs, inputs @ np.arange(4.0) + 0.1 * partition_id


def initial_weights() -> list[np.ndarray]:
    """Give a vector, then scalars of rising value that all act as the bias."""
    return [np.zeros(4, np.float32), *(np.full((), 0.01 * i, np.float32) for i in range(1, 11))]


def loss_of(weights: list[np.ndarray], inputs: np.ndarray, targets: np.ndarray) -> float:
    """Give the mean squared error."""
    return float(np.mean((inputs @ weights[0] + sum(weights[1:]) - targets) ** 2))


def train(
    weights: list[np.ndarray], inputs: np.ndarray, targets: np.ndarray, *, epochs: int, rate: float
) -> list[np.ndarray]:
    """Take gradient steps; the i-th bias learns i times as fast as the first."""
    vector, biases = weights[0], list(weights[1:])
    for _ in range(epochs):
        errors = inputs @ vector + sum(biases) - targets
        vector = vector - rate * inputs.T @ errors / len(errors)
        biases = [
            np.asarray(bias - 0.001 * i * rate * errors.mean()) for i, bias in enumerate(biases, 1)
        ]
    return [vector, *biases]
