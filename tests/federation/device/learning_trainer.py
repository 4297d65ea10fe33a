"""A trainer that makes models anew and corrects gradients, as a child process runs it."""

from collections.abc import Mapping

import numpy as np

from minga.federation.parameters import Parameters
from minga.federation.trainer import LocalTrainer, Scalar, Update


class LearningTrainer:
    """Its gradient is 2 everywhere; it takes one step of length 1."""

    def fit(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Update:
        """Take the step."""
        return self.fit_corrected(parameters, config, {})

    def fit_corrected(
        self, parameters: Parameters, config: Mapping[str, Scalar], correction: Parameters
    ) -> Update:
        """Take the step, corrected."""
        gradient = {name: np.full_like(value, 2.0) for name, value in parameters.items()}
        delta = {name: -(value + correction.get(name, 0)) for name, value in gradient.items()}
        return Update(delta=delta, num_examples=1, gradient=gradient)

    def evaluate(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Mapping[str, float]:
        """Measure nothing."""
        return {}

    def initial(self, config: Mapping[str, Scalar]) -> Parameters:
        """Give a head of as many values as the configuration says."""
        return {"head": np.ones(int(config["size"]), np.float32)}


def make(options: Mapping[str, Scalar]) -> LocalTrainer:
    """Make a trainer."""
    return LearningTrainer()
