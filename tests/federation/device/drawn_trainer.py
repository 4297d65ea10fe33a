"""A trainer whose update is drawn from its name: known to a test, and in nobody's model."""

import time
from collections.abc import Mapping

import numpy as np

from minga.federation.parameters import Parameters
from minga.federation.trainer import LocalTrainer, Scalar, Update


def drawn_levels(seed: int, num_values: int) -> np.ndarray:
    """Draw whole numbers from -1000 to 1000, shape `(num_values,)`."""
    return np.random.default_rng(seed).integers(-1000, 1001, num_values)


class DrawnTrainer:
    """Moves every coordinate by a whole number that is drawn from a seed."""

    def __init__(self, seed: int, num_examples: int, delay_s: float) -> None:
        self.seed = seed
        self.num_examples = num_examples
        self.delay_s = delay_s

    def fit(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Update:
        """Take `delay_s` and give the drawn update."""
        time.sleep(self.delay_s)
        sizes = [value.size for _, value in sorted(parameters.items())]
        levels = np.split(drawn_levels(self.seed, sum(sizes)), np.cumsum(sizes)[:-1])
        delta = {
            name: part.astype(np.float32).reshape(value.shape)
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
        num_examples=int(options["num_examples"]),
        delay_s=float(options.get("delay_s", 0.0)),
    )
