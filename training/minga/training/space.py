"""What a Task says about its hyper-parameters: their domains and what is best.

Domains know no search library; `minga.training.search.suggestions` draws from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minga.training.errors import TaskError

Param = bool | int | float | str
"""A hyper-parameter's value."""

Params = Mapping[str, Param]

ARCHITECTURE = "architecture"
"""The hyper-parameter that says what kind of model is built; see `minga.training.architectures`."""

FEATURES = "features"
"""The hyper-parameter with the columns that a model may go by, joined by commas."""

OWN = "own"
LINEAR = "linear"
MLP = "mlp"
NETWORKS = (OWN, LINEAR, MLP)
"""Kinds of models that are networks, and so have weights that devices can train further."""


def architecture_of(params: Params) -> str:
    """Name what hyper-parameters build: `own` unless they say otherwise."""
    return str(params.get(ARCHITECTURE, OWN))


def features_of(params: Params) -> tuple[str, ...]:
    """Give the columns that a model may go by; none means all."""
    return tuple(name for name in str(params.get(FEATURES, "")).split(",") if name)


def is_network(params: Params) -> bool:
    """Tell whether hyper-parameters build a network, which can be federated."""
    return architecture_of(params) in NETWORKS


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values."""

    options: tuple[Param, ...]


@dataclass(frozen=True, slots=True)
class Uniform:
    """A float of `[low, high)`, each as likely."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LogUniform:
    """A float of `[low, high)`, each order of magnitude as likely."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RandInt:
    """An integer of `[low, high)`, each as likely."""

    low: int
    high: int


Domain = Choice | Uniform | LogUniform | RandInt


def choice(options: Sequence[Param]) -> Choice:
    """Search over the given values.

    Raises:
        TaskError: there is no value.
    """
    if not options:
        raise TaskError("choice([]) has nothing to choose from; give it at least one value")
    return Choice(tuple(options))


def uniform(low: float, high: float) -> Uniform:
    """Search over floats of `[low, high)`.

    Raises:
        TaskError: the range is empty.
    """
    _refuse_empty("uniform", low, high)
    return Uniform(float(low), float(high))


def loguniform(low: float, high: float) -> LogUniform:
    """Search over floats of `[low, high)` by order of magnitude.

    Raises:
        TaskError: the range is empty or not above zero.
    """
    _refuse_empty("loguniform", low, high)
    if low <= 0:
        raise TaskError(f"loguniform({low}, {high}) starts at {low}; it must start above 0")
    return LogUniform(float(low), float(high))


def randint(low: int, high: int) -> RandInt:
    """Search over integers of `[low, high)`.

    Raises:
        TaskError: the range is empty.
    """
    _refuse_empty("randint", low, high)
    return RandInt(low, high)


WORST = 1e30
"""Stands for a trial without a value; finite, because ASHA interpolates between trials."""


@dataclass(frozen=True, slots=True)
class Maximize:
    """The larger this metric, the better."""

    metric: str
    mode = "max"
    worst = -WORST

    def gain(self, value: float, over: float) -> float:
        """Give how much better `value` is than `over`; negative if it is worse."""
        return value - over


@dataclass(frozen=True, slots=True)
class Minimize:
    """The smaller this metric, the better."""

    metric: str
    mode = "min"
    worst = WORST

    def gain(self, value: float, over: float) -> float:
        """Give how much better `value` is than `over`; negative if it is worse."""
        return over - value


Objective = Maximize | Minimize


def _refuse_empty(name: str, low: float, high: float) -> None:
    if not low < high:
        raise TaskError(f"{name}({low}, {high}) is an empty range; low must be below high")
