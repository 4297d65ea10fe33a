"""Which tensors of the global model a Flower app sees, in which order and by which names.

Ours have names and no order; many Flower apps know a list of arrays and no names, in the order of
their network's `state_dict`. So a campaign for such apps says in its training configuration, under
`FLOWER_ARRAYS`, which names make the list: a JSON object from our name to the app's, in order.
Tensors that it leaves out are not shown to the app and do not change. Without it the names must be
numbers, as Flower's own for lists are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minga.federation.parameters import Parameters
from minga.federation.trainer import Scalar, TrainingConfig

FLOWER_ARRAYS: Final = "flower_arrays"
"""Key of a training configuration: see the module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayNames:
    """Our name of each array and the app's, in the app's order."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    @classmethod
    def of(cls, parameters: Parameters, config: TrainingConfig) -> Self:
        """Find which tensors an app sees.

        Raises:
            ValueError: the order is not said, or names tensors that the model does not have.
        """
        text = config.get(FLOWER_ARRAYS)
        names = _read(text) if text is not None else {n: n for n in _numbered(parameters)}
        if missing := names.keys() - parameters.keys():
            raise ValueError(
                f"{FLOWER_ARRAYS} names {min(missing)!r}, which the model does not have; "
                f"it has {', '.join(sorted(parameters))}"
            )
        return cls(ours=tuple(names), theirs=tuple(names.values()))

    def pick(self, parameters: Parameters) -> list[NDArray[np.float32]]:
        """Give copies of the app's arrays, in its order: user code may write into what it gets."""
        return [np.array(parameters[name]) for name in self.ours]

    def delta(self, parameters: Parameters, returned: Sequence[ArrayLike]) -> Parameters:
        """Give what changed; zero for each tensor that the app does not see.

        Args:
            parameters: what the app was given, all tensors of the model.
            returned: the app's arrays, in its order.

        Raises:
            ValueError: an array is missing, has another shape, or holds NaN or infinity.
        """
        delta = {name: np.zeros_like(value) for name, value in parameters.items()}
        for name, value in self.put(parameters, returned).items():
            delta[name] = np.asarray(value - parameters[name], np.float32)
        return delta

    def put(self, parameters: Parameters, returned: Sequence[ArrayLike]) -> Parameters:
        """Give `parameters` with the app's arrays in their places; raises as `delta` does."""
        if len(returned) != len(self.ours):
            raise ValueError(
                f"{len(returned)} arrays came back for the {len(self.ours)} that were given: "
                f"{', '.join(self.theirs)}"
            )
        result = dict(parameters)
        for ours, theirs, value in zip(self.ours, self.theirs, returned, strict=True):
            array = np.asarray(value)
            if array.shape != parameters[ours].shape:
                raise ValueError(
                    f"array {theirs!r} came back in shape {array.shape}, "
                    f"the model's is {parameters[ours].shape}"
                )
            with np.errstate(over="ignore"):  # told below
                result[ours] = array.astype(np.float32)
            if not np.isfinite(result[ours]).all():
                raise ValueError(f"array {theirs!r} came back with NaN or infinity")
        return result


def to_parameters(arrays: Sequence[ArrayLike]) -> Parameters:
    """Name a list of arrays by their places, as float32: a model to start a campaign from."""
    return {str(place): np.array(array, np.float32) for place, array in enumerate(arrays)}


def to_arrays(parameters: Parameters) -> list[NDArray[np.float32]]:
    """Give the list again that `to_parameters` named.

    Raises:
        ValueError: a name is no number.
    """
    return [parameters[name] for name in _numbered(parameters)]


def names_to_text(names: Mapping[str, str]) -> str:
    """Write names, ours -> the app's, for the training configuration."""
    return json.dumps(dict(names), separators=(",", ":"))


def without_names(config: TrainingConfig) -> dict[str, Scalar]:
    """Give the configuration as the app is to see it."""
    return {name: value for name, value in config.items() if name != FLOWER_ARRAYS}


def _read(text: Scalar) -> dict[str, str]:
    try:
        names = json.loads(str(text))
    except ValueError as error:
        raise ValueError(f"{FLOWER_ARRAYS} is no JSON: {error}") from error
    is_text = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not is_text or not names or len(set(names.values())) < len(names):
        raise ValueError(f"{FLOWER_ARRAYS} is no JSON object from name to name, each once")
    return {str(ours): str(theirs) for ours, theirs in names.items()}


def _numbered(parameters: Parameters) -> list[str]:
    if not all(name.isdecimal() for name in parameters):
        raise ValueError(
            f"the order of {len(parameters)} named tensors is not known to a Flower app; "
            f"say it in the training configuration as {FLOWER_ARRAYS}, or start the campaign from "
            "a list of arrays (minga.federation.flower.arrays.to_parameters)"
        )
    return sorted(parameters, key=int)
