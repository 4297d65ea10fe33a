"""A Flower strategy as one step of a round: from the model and what came back to the next model.

`configure` is asked before a round and `aggregate` after it, as Flower's own server does:

| kind | before | after |
|---|---|---|
| `flwr.server.strategy.Strategy` | `configure_fit` | `aggregate_fit`, `evaluate` |
| `flwr.serverapp.strategy.Strategy` | `configure_train` | `aggregate_train` |

Each call says from which state it starts, and `aggregate` gives the next one (`state`), so what
comes out depends on what goes in alone, also after a restart or when a step is taken again. As long
as nothing failed the same object goes on, as it would in Flower.

Which strategy it is, is the coordinator's choice: `allowed` names those of flwr that are known to
work, and its operator may add others by name. No other name is imported, whoever sends it.

Memory is that of Flower's interface: all updates of a round at once, several times.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from minga.federation.errors import StrategyError
from minga.federation.flower.arrays import ArrayNames
from minga.federation.flower.config import StrategyName
from minga.federation.limits import MAX_REASON_CHARS, MAX_STRATEGY_BYTES
from minga.federation.parameters import Layout, Parameters
from minga.federation.trainer import Scalar, TrainingConfig

_log = logging.getLogger(__name__)

Arrays = list[NDArray[Any]]

_NAMES: Final = (
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "Bulyan",
)

BUILT_IN: Final = frozenset(
    f"{module}:{name}"
    for module in ("flwr.server.strategy", "flwr.serverapp.strategy")
    for name in _NAMES
) | {"flwr.serverapp.strategy:MultiKrum"}
"""Flower's own strategies that a campaign may name without a word of the coordinator's operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """What a strategy wants of the devices in a round."""

    training: dict[str, Scalar]
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one device, or one sum over several, came to.

    Attributes:
        name: the device, or what the sum is called.
        update: change of the model's vector, shape `(num_values,)`, in the order of `Layout`.
        num_examples: its weight.
        metrics: what the device measured, if it said so.
    """

    name: str
    update: NDArray[np.float32]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a strategy goes: the next model, its state after that, and what it measured."""

    parameters: Parameters
    state: bytes
    metrics: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """A result as strategies take it: arrays in the app's order instead of an update."""

    name: str
    arrays: Arrays
    num_examples: int
    metrics: Mapping[str, float]


class Kind(Protocol):
    """One of the two kinds of strategies, with the object at work."""

    strategy: object

    @property
    def only_averages(self) -> bool:
        """True if it is known that the step depends on the weighted mean alone."""
        ...

    def configure(
        self,
        number: int,
        arrays: Mapping[str, NDArray[np.float32]],
        config: dict[str, Scalar],
        devices: Sequence[str],
    ) -> Instructions:
        """Ask what devices are to do."""
        ...

    def aggregate(
        self, number: int, results: Sequence[Returned], failures: Mapping[str, str]
    ) -> tuple[Arrays | None, dict[str, Scalar]]:
        """Make the next arrays, in the app's order, and say what was measured."""
        ...


class FlowerStrategy:
    """A campaign's strategy; the calls of one campaign come one after the other.

    Args:
        name: which one.
        allowed: the references that this coordinator's operator lets in, beside `BUILT_IN`.

    Raises:
        StrategyError: it is not allowed.
    """

    def __init__(self, name: StrategyName, allowed: Sequence[str] = ()) -> None:
        if name.reference not in BUILT_IN and name.reference not in allowed:
            raise StrategyError(
                f"this coordinator does not run the strategy {name.reference!r}; its operator lets "
                f"it in with: minga coordinator run --strategy {name.reference}"
            )
        self._name = name
        self._live: _Live | None = None

    def require_possible(
        self, model: Parameters, config: TrainingConfig, *, num_results: int, sums: bool
    ) -> None:
        """Refuse a campaign that the strategy cannot serve.

        Args:
            model: where it starts.
            config: what the devices are told.
            num_results: how many results a round gives at most.
            sums: they are secure sums, not the devices' own updates.

        Raises:
            StrategyError: it cannot be made, wants each device's update and gets one sum, or
                needs too much memory.
        """
        live = self._at(b"", model, ArrayNames.of(model, config))
        if sums and num_results == 1 and not (self._name.on_sums or live.kind.only_averages):
            raise StrategyError(
                f"{self._name.reference} looks at single updates, and secure aggregation gives it "
                "one sum; use plain rounds, several secure groups, or if it only averages set "
                "on_sums = true in [federation.flower]"
            )
        num_bytes = num_results * sum(value.nbytes for value in model.values())
        if num_bytes > MAX_STRATEGY_BYTES:
            raise StrategyError(
                f"a Flower strategy holds all updates of a round in memory, here {num_bytes:,} "
                f"bytes, allowed are {MAX_STRATEGY_BYTES:,}; lower the cohort, or use a rule of "
                "[federation] instead"
            )

    def configure(
        self,
        *,
        number: int,
        state: bytes,
        model: Parameters,
        config: TrainingConfig,
        devices: Sequence[str],
    ) -> Instructions:
        """Ask what a round's devices are to do.

        Args:
            number: the round's number, from 1 on.
            state: what the strategy kept after the round before; empty in the first one.
            model: the global model.
            config: the campaign's training configuration.
            devices: whom the strategy may choose from.

        Returns:
            The configuration for all devices, the campaign's and the strategy's, and the devices
            that it chose.

        Raises:
            StrategyError: it fails, chooses nobody, or wants what a round cannot do.
        """
        names = ArrayNames.of(model, config)
        live = self._at(state, model, names)
        arrays = dict(zip(names.theirs, names.pick(model), strict=True))
        with self._running():
            instructions = live.kind.configure(number, arrays, dict(config), devices)
        if not instructions.devices:
            raise StrategyError(
                f"{self._name.reference} chose none of the {len(devices)} devices; its arguments "
                "may ask for more, such as min_fit_clients or min_train_nodes"
            )
        live.configured = number
        return instructions

    def aggregate(
        self,
        *,
        number: int,
        state: bytes,
        model: Parameters,
        config: TrainingConfig,
        devices: Sequence[str],
        results: Sequence[Result],
        failures: Mapping[str, str],
    ) -> Step:
        """Make the next global model.

        Args:
            number: the round's number.
            state: what `configure` was given for it.
            model: the global model that the devices started from.
            config: the campaign's training configuration.
            devices: whom the round invited.
            results: what came back, at least one.
            failures: device -> why nothing came from it.

        Raises:
            StrategyError: the strategy fails or gives no parameters of this model.
        """
        names = ArrayNames.of(model, config)
        live = self._at(state, model, names)
        if live.configured != number:  # the coordinator restarted meanwhile
            self.configure(number=number, state=state, model=model, config=config, devices=devices)
        returned = [_returned(result, model, names) for result in results]
        self._live = None  # until it is known where the strategy stands
        with self._running():
            arrays, metrics = live.kind.aggregate(number, returned, failures)
        if arrays is None:
            raise self._error(" made no parameters of the results")
        try:
            parameters = names.put(model, arrays)
        except ValueError as error:
            raise self._error(f": {error}") from error
        live.state, live.configured = live.dump(), None
        self._live = live
        if metrics:
            _log.info("%s, round %d: %s", self._name.reference, number, metrics)
        return Step(parameters=parameters, state=live.state, metrics=metrics)

    def _at(self, state: bytes, model: Parameters, names: ArrayNames) -> "_Live":
        """Give the strategy as it was when `state` was taken."""
        if self._live is None or self._live.state != state:
            with self._running():
                self._live = _Live(self._make(names.pick(model)), state)
        return self._live

    def _make(self, arrays: Arrays) -> object:
        """Import and make the strategy; Flower's older ones are given the first parameters."""
        from flwr.common import ndarrays_to_parameters  # noqa: PLC0415 - loads flwr

        module, _, attribute = self._name.reference.partition(":")
        make: Callable[..., object] = getattr(importlib.import_module(module), attribute)
        arguments: dict[str, Any] = dict(self._name.arguments)
        if _takes(make, "initial_parameters"):
            arguments["initial_parameters"] = ndarrays_to_parameters(arrays)
        return make(**arguments)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Tell an error of the strategy, whatever it is, as one of its own."""
        try:
            yield
        except StrategyError as error:
            raise self._error(f": {error}") from error
        except (Exception, SystemExit) as error:
            raise self._error(f" failed: {type(error).__name__}: {error}") from error

    def _error(self, what: str) -> StrategyError:
        """Say what went wrong, briefly: it goes into records and to devices."""
        return StrategyError(f"{self._name.reference}{what}"[:MAX_REASON_CHARS])


class _Live:
    """A strategy at work, and the state that it stands at."""

    def __init__(self, strategy: object, state: bytes) -> None:
        from minga.federation.flower.state import dump, held_by, restore  # noqa: PLC0415

        self.kind = _kind_of(strategy, is_new=not state)
        self.state = state
        self.configured: int | None = None
        made_with = held_by(strategy)
        self.dump: Callable[[], bytes] = lambda: dump(strategy, made_with)
        if state:
            restore(strategy, state)


def _kind_of(strategy: object, *, is_new: bool) -> Kind:
    from flwr.server import strategy as fit  # noqa: PLC0415 - loads flwr
    from flwr.serverapp import strategy as train  # noqa: PLC0415

    from minga.federation.flower.fit_strategy import FitKind  # noqa: PLC0415
    from minga.federation.flower.train_strategy import TrainKind  # noqa: PLC0415

    if isinstance(strategy, fit.Strategy):
        return FitKind(strategy, is_new=is_new)
    if isinstance(strategy, train.Strategy):
        return TrainKind(strategy)
    raise StrategyError(f"it makes a {type(strategy).__name__}, which is no Flower strategy")


def _takes(make: Callable[..., object], name: str) -> bool:
    """Say whether an argument is taken, also by a class that hands all it gets to its base."""
    parameters = inspect.signature(make).parameters
    if name in parameters or not isinstance(make, type):
        return name in parameters
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return hands_on and any(
        name in inspect.signature(base).parameters for base in make.__mro__[1:-1]
    )


def _returned(result: Result, model: Parameters, names: ArrayNames) -> Returned:
    layout = Layout.of(model)
    moved = layout.unflatten(layout.flatten(model) + result.update)
    return Returned(
        name=result.name,
        arrays=[moved[name] for name in names.ours],
        num_examples=result.num_examples,
        metrics=result.metrics,
    )
