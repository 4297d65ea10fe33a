"""The trainer of the devices in `rounds.py`: it takes no time and gives an update of its own."""

from collections.abc import Mapping

import numpy as np
from rivals.rounds_work import step_of

from minga.federation.parameters import Parameters
from minga.federation.trainer import Scalar, TrainingConfig, Update

NUM_EXAMPLES = 1000
"""Of every device: with the same weight for all, the mean is that of the steps."""


class OwnStep:
    """Moves every coordinate by the step of its device."""

    def __init__(self, device: int) -> None:
        self._step = np.float32(step_of(device))

    def fit(self, parameters: Parameters, config: TrainingConfig) -> Update:  # noqa: ARG002
        """Give this device's update."""
        delta = {name: np.full_like(value, self._step) for name, value in parameters.items()}
        return Update(delta=delta, num_examples=NUM_EXAMPLES)

    def evaluate(self, parameters: Parameters, config: TrainingConfig) -> Mapping[str, float]:
        """Measure nothing: no round of the benchmark asks for it."""
        raise NotImplementedError


def make(options: Mapping[str, Scalar]) -> OwnStep:
    """Make a device's trainer."""
    return OwnStep(int(options["device"]))
