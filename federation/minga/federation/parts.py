"""Which tensors of a model travel.

*Personal* tensors never leave their device: each device keeps its own, and neither the model that
travels nor an update has them. *Control variates* (SCAFFOLD) travel beside the model: one tensor
for each of its tensors, under the same name behind `CONTROL`.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

import numpy as np

from minga.federation.errors import PeerError
from minga.federation.parameters import Parameters

CONTROL: Final = "control/"
"""What the name of a control variate's tensor begins with."""


def is_personal(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a tensor stays at home: its name matches one of some patterns, as `head.*`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def split_personal(
    parameters: Parameters, patterns: Sequence[str]
) -> tuple[Parameters, Parameters]:
    """Give the tensors that travel, and those that stay at home."""
    shared, personal = Parameters(), Parameters()
    for name, tensor in parameters.items():
        (personal if is_personal(name, patterns) else shared)[name] = tensor
    return shared, personal


def with_control(model: Parameters, control: Parameters | None = None) -> Parameters:
    """Put a control variate beside a model; without one it is zero.

    Raises:
        PeerError: the model's own names look like those of control variates.
    """
    if has_control(model):
        raise PeerError(f"a tensor's name begins with {CONTROL!r}, as control variates' do")
    if control is None:
        control = {name: np.zeros_like(tensor) for name, tensor in model.items()}
    return {**model, **{CONTROL + name: tensor for name, tensor in control.items()}}


def has_control(names: Iterable[str]) -> bool:
    """Tell whether tensors of some names are, or hold, control variates."""
    return any(name.startswith(CONTROL) for name in names)


def split_control(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Give the model, and the control variate beside it; that is empty if there is none."""
    model, control = Parameters(), Parameters()
    for name, tensor in parameters.items():
        if name.startswith(CONTROL):
            control[name.removeprefix(CONTROL)] = tensor
        else:
            model[name] = tensor
    return model, control
