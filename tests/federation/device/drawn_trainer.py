"""A trainer whose update is drawn from its name: known to a test, and in nobody's model."""

from collections.abc import Mapping

import numpy as np

from minga.federation.parameters import Parameters
from minga.federation.trainer import LocalTrainer, Scalar, Update

NUM_LEVELS = 1000


def drawn_levels(seed: int, num_values: int) -> np.ndarray:
    """Draw whole numbers from -1000 to 1000, shape `(num_values,)`."""
    rng = np.random.default_rng(seed)
    return rng.integers(-NUM_LEVELS, NUM_LEVELS + 1, num_values)


class DrawnTrainer:
    """Moves every coordinate by a whole number of steps, drawn from a seed."""

    def __init__(self, seed: int, step: float, num_examples: int) -> None:
        self.seed = seed
        self.step = step
        self.num_examples = num_examples

    def fit(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Update:
        """Give the drawn update."""
        sizes = [value.size for _, value in sorted(parameters.items())]
        levels = np.split(drawn_levels(self.seed, sum(sizes)), np.cumsum(sizes)[:-1])
        delta = {
            name: (part * self.step).astype(np.float32).reshape(value.shape)
            for (name, value), part in zip(sorted(parameters.items()), levels, strict=True)
        }
        return Update(delta=delta, num_examples=self.num_examples, metrics={})

    def evaluate(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Mapping[str, float]:
        """Judge nothing."""
        return {}


def make(options: Mapping[str, Scalar]) -> LocalTrainer:
    """Make a trainer from a device's options."""
    return DrawnTrainer(
        seed=int(options["seed"]),
        step=float(options["step"]),
        num_examples=int(options["num_examples"]),
    )
