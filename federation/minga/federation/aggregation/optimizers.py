"""Server optimisers: where the global model goes, given the mean of its devices' updates.

The mean update stands in for a gradient that points downhill. Each optimiser keeps some vectors
from round to round, its state, as long as the model:

| optimiser | state | source |
|---|---|---|
| `FedAvg` | none | McMahan et al., AISTATS 2017 |
| `FedAvgM` | momentum | Hsu et al., arXiv:1909.06335, 2019 |
| `FedAdagrad`, `FedAdam`, `FedYogi` | momentum, variance | Reddi et al., ICLR 2021, algorithm 2 |

As in that algorithm there is no bias correction: `tau`, and a variance that starts at `tau ** 2`,
keep the first steps small. (Flower's FedAdam starts at zero and corrects, with other first steps.)

Everything here is pure and works coordinate by coordinate, so a model may be moved in pieces.
Sums are taken in float64 and rounded once; the same inputs give the same bits.

Not here: the mean itself (`secagg`), where state is kept between rounds (`coordinator`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.errors import StepError
from minga.federation.memory import BLOCK_VALUES

Vector = NDArray[np.float32]
"""One number for each of the model's, shape `(n,)`."""

State = Mapping[str, Vector]
"""What an optimiser keeps from round to round: name -> vector."""

Wide = NDArray[np.float64]
"""A vector while it is computed with."""

MOMENTUM: Final = "momentum"
VARIANCE: Final = "variance"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizer(ABC):
    """One way to make the next global model; `step` and `advance` take the step.

    Attributes:
        learning_rate: the step's length, above 0; eta in the sources.

    Raises:
        ValueError: a number is out of its range.
    """

    learning_rate: float

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)

    @abstractmethod
    def start(self) -> Mapping[str, float]:
        """Name the state's vectors, and the value that fills each before the first round."""

    @abstractmethod
    def direction(self, state: Mapping[str, Wide], delta: Wide) -> tuple[dict[str, Wide], Wide]:
        """Give the next state, and where the model goes, by `learning_rate` times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg(ServerOptimizer):
    """Go along the mean update; with a learning rate of 1 to the mean of the devices' models."""

    def start(self) -> Mapping[str, float]:
        """Keep nothing."""
        return {}

    def direction(self, state: Mapping[str, Wide], delta: Wide) -> tuple[dict[str, Wide], Wide]:  # noqa: ARG002
        """Go along the mean update."""
        return {}, delta


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """Go along a running sum of mean updates, in which older ones fade.

    Attributes:
        momentum: by how much the sum shrinks each round, from 0 to below 1.
    """

    momentum: float

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)
        _require_share("momentum", self.momentum)

    def start(self) -> Mapping[str, float]:
        """Keep the sum."""
        return {MOMENTUM: 0.0}

    def direction(self, state: Mapping[str, Wide], delta: Wide) -> tuple[dict[str, Wide], Wide]:
        """Go along the sum."""
        momentum = self.momentum * state[MOMENTUM] + delta
        return {MOMENTUM: momentum}, momentum


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive(ServerOptimizer):
    """Go along a running mean of updates, less far where updates vary; Reddi et al., algorithm 2.

    Attributes:
        beta_1: how much of the running mean of updates stays each round, from 0 to below 1.
        tau: what is added to the root of the variance, above 0: the smaller, the more adaptive.
    """

    beta_1: float
    tau: float

    def __post_init__(self) -> None:
        _require_positive("learning_rate", self.learning_rate)
        _require_share("beta_1", self.beta_1)
        _require_positive("tau", self.tau)

    @abstractmethod
    def next_variance(self, variance: Wide, square: Wide) -> Wide:
        """Give v_t from v_{t-1} and the squared mean update."""

    def start(self) -> Mapping[str, float]:
        """Keep mean and variance; algorithm 2 asks for a first variance of `tau ** 2` or more."""
        return {MOMENTUM: 0.0, VARIANCE: self.tau**2}

    def direction(self, state: Mapping[str, Wide], delta: Wide) -> tuple[dict[str, Wide], Wide]:
        """Go to m_t / (sqrt(v_t) + tau)."""
        momentum = self.beta_1 * state[MOMENTUM] + (1.0 - self.beta_1) * delta
        variance = self.next_variance(state[VARIANCE], np.square(delta))
        return (
            {MOMENTUM: momentum, VARIANCE: variance},
            momentum / (np.sqrt(variance) + self.tau),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdagrad(Adaptive):
    """The variance is the sum of all squared updates: steps get shorter and shorter."""

    def next_variance(self, variance: Wide, square: Wide) -> Wide:
        """Add the square."""
        return variance + square


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fading(Adaptive):
    """The variance forgets.

    Attributes:
        beta_2: how much of the variance stays each round, from 0 to below 1.
    """

    beta_2: float

    def __post_init__(self) -> None:
        Adaptive.__post_init__(self)
        _require_share("beta_2", self.beta_2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdam(_Fading):
    """The variance is a running mean of squared updates."""

    def next_variance(self, variance: Wide, square: Wide) -> Wide:
        """Take the mean on."""
        return self.beta_2 * variance + (1.0 - self.beta_2) * square


@dataclass(frozen=True, slots=True, kw_only=True)
class FedYogi(_Fading):
    """As FedAdam, but the variance changes by what is new alone, so it falls back slowly."""

    def next_variance(self, variance: Wide, square: Wide) -> Wide:
        """Move towards the square."""
        return variance - (1.0 - self.beta_2) * square * np.sign(variance - square)


def initial_state(optimizer: ServerOptimizer, num_values: int) -> dict[str, Vector]:
    """Give the state before the first round, for a model of so many values."""
    return {
        name: np.full(num_values, value, np.float32) for name, value in optimizer.start().items()
    }


def step(
    optimizer: ServerOptimizer, state: State, values: Vector, mean_delta: Vector
) -> tuple[dict[str, Vector], Vector]:
    """Take one step.

    Args:
        optimizer: which step.
        state: what it kept, or `initial_state`; not changed.
        values: the global model, shape `(n,)`; not changed.
        mean_delta: the weighted mean of the devices' updates, shape `(n,)`; not changed.

    Returns:
        The next state and the next global model.

    Raises:
        StepError: see `advance`.
    """
    moved_state = {name: vector.copy() for name, vector in state.items()}
    moved = mean_delta.copy()
    advance(optimizer, moved_state, values, moved)
    return moved_state, moved


def advance(optimizer: ServerOptimizer, state: State, values: Vector, mean_delta: Vector) -> None:
    """Take one step in place, with no more memory than a block's.

    Args:
        optimizer: which step.
        state: what it kept, or `initial_state`; becomes the next state.
        values: the global model, shape `(n,)`; not changed.
        mean_delta: the weighted mean of the devices' updates, shape `(n,)`; becomes the next
            global model.

    Raises:
        StepError: the shapes differ (nothing is broadcast), the state is another optimiser's, or
            the step leads to NaN or infinity; `state` and `mean_delta` are of no use any more.
    """
    _require_fitting(optimizer, state, values, mean_delta)
    for first in range(0, len(values), BLOCK_VALUES):
        block = slice(first, first + BLOCK_VALUES)
        with np.errstate(over="ignore", invalid="ignore"):  # told below, with a remedy
            moved_state, direction = optimizer.direction(
                {name: vector[block].astype(np.float64) for name, vector in state.items()},
                mean_delta[block].astype(np.float64),
            )
            mean_delta[block] = values[block] + optimizer.learning_rate * direction
            for name, moved in moved_state.items():
                state[name][block] = moved
        if not all(np.isfinite(vector[block]).all() for vector in (mean_delta, *state.values())):
            raise StepError(
                "the server's step leads to NaN or infinity; lower the learning rate of "
                "[federation.server_optimizer], or start from a finite model"
            )


def _require_fitting(
    optimizer: ServerOptimizer, state: State, values: Vector, mean_delta: Vector
) -> None:
    if values.ndim != 1 or values.shape != mean_delta.shape:
        raise StepError(
            f"the mean update has shape {mean_delta.shape}, the model {values.shape}; "
            "both must be vectors of one length"
        )
    kept, known = sorted(state), sorted(optimizer.start())
    if kept != known:
        raise StepError(
            f"the state has {kept or 'nothing'}, {type(optimizer).__name__} keeps "
            f"{known or 'nothing'}; go on with the optimiser that made it"
        )
    for name, vector in state.items():
        if vector.shape != values.shape:
            raise StepError(
                f"the state's {name} has shape {vector.shape}, the model {values.shape}; "
                "go on with the model that it was made with"
            )


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and isfinite(value)):
        raise ValueError(f"{name} is {value:g}; it must be above 0 and finite")


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value:g}; it must be from 0 to below 1")
