"""A trainer whose data has a column, as a child process runs it."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from minga.federation.parameters import Parameters
from minga.federation.trainer import LocalTrainer, Scalar, Update


class ColumnsTrainer:
    """Has the columns that its options name."""

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.data = {
            name: np.array(str(text).split(","), np.float64) for name, text in options.items()
        }

    def columns(self, names: Sequence[str]) -> Mapping[str, NDArray[np.float64]]:
        """Give the columns."""
        return {name: values for name, values in self.data.items() if name in names}

    def fit(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Update:
        """Learn nothing."""
        return Update(delta=parameters, num_examples=1)

    def evaluate(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Mapping[str, float]:
        """Measure nothing."""
        return {}


def make(options: Mapping[str, Scalar]) -> LocalTrainer:
    """Make a trainer."""
    return ColumnsTrainer(options)
