"""What a device runs to learn: the only thing the federation knows of a model's code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from minga.federation.parameters import Parameters

Scalar = bool | int | float | str
"""A value of a training configuration."""

TrainingConfig = Mapping[str, Scalar]


NUM_EXAMPLES: Final = "num_examples"
"""Name among the metrics of an evaluation: on how many examples they were measured."""

PROXIMAL_MU: Final = "proximal_mu"
"""Key of a training configuration: how strongly a device is pulled back to the global model."""


def proximal_mu(config: TrainingConfig) -> float:
    """Read how strongly devices are pulled back to the global model; 0 if nothing is said.

    With mu above 0 a device minimises its own loss plus mu / 2 times the squared distance to the
    global model that it started from: FedProx (Li et al., MLSys 2020).

    Raises:
        ValueError: it is no number from 0 on.
    """
    value = config.get(PROXIMAL_MU, 0.0)
    if isinstance(value, bool | str) or not (value >= 0 and isfinite(value)):
        raise ValueError(f"{PROXIMAL_MU} is {value!r}; give a number from 0 on, such as 0.01")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What local training changed.

    `delta` has the names and shapes of the parameters it started from.
    """

    delta: Parameters
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    gradient: Parameters | None = None
    """Of `fit_corrected` alone: the mean of the steps' gradients before they were corrected; a
    tensor that is missing has none."""


class LocalTrainer(Protocol):
    """Trains and evaluates on this device's data."""

    def fit(self, parameters: Parameters, config: TrainingConfig) -> Update:
        """Train from `parameters` and say what changed."""
        ...

    def evaluate(self, parameters: Parameters, config: TrainingConfig) -> Mapping[str, float]:
        """Measure `parameters` on this device's data.

        `num_examples` among the metrics says on how many examples, which is their weight in a
        mean over devices; without it that is the count of those trained on, or else 1.
        """
        ...


@runtime_checkable
class CountsExamples(Protocol):
    """A trainer that says beforehand how many examples it trains on; the others need not."""

    @property
    def num_examples(self) -> int:
        """How many examples `fit` trains on."""
        ...


@runtime_checkable
class HasColumns(Protocol):
    """A trainer whose data has columns that queries may be about."""

    def columns(self, names: Sequence[str]) -> Mapping[str, NDArray[np.float64]]:
        """Give some columns, equally long, NaN where a row has no value; unknown ones are left out.

        They are read in the process that trains, and only statistics of them leave it.
        """
        ...


@runtime_checkable
class MakesParameters(Protocol):
    """A trainer that can make a model anew; campaigns with personal tensors need that."""

    def initial(self, config: TrainingConfig) -> Parameters:
        """Give untrained parameters, all of them."""
        ...


@runtime_checkable
class CorrectsGradients(Protocol):
    """A trainer that can learn with control variates (SCAFFOLD)."""

    def fit_corrected(
        self, parameters: Parameters, config: TrainingConfig, correction: Parameters
    ) -> Update:
        """Train as `fit` does, with a correction added to the gradient of every step.

        Args:
            parameters: where it starts.
            config: as for `fit`.
            correction: for each tensor that has one, of its shape.

        Returns:
            The update, with its `gradient`.
        """
        ...
