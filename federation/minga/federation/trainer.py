"""What a device runs to learn: the only thing the federation knows of a model's code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from minga.federation.parameters import Parameters

Scalar = bool | int | float | str
"""A value of a training configuration."""

TrainingConfig = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What local training changed.

    `delta` has the names and shapes of the parameters it started from.
    """

    delta: Parameters
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class LocalTrainer(Protocol):
    """Trains and evaluates on this device's data."""

    def fit(self, parameters: Parameters, config: TrainingConfig) -> Update:
        """Train from `parameters` and say what changed."""
        ...

    def evaluate(self, parameters: Parameters, config: TrainingConfig) -> Mapping[str, float]:
        """Measure `parameters` on this device's data."""
        ...


TrainerFactory = Callable[[Mapping[str, Scalar]], LocalTrainer]
"""Makes a trainer from a device's own options; named `package.module:attribute`."""
