"""How a network's values relate to what travels between coordinator and devices.

All are vectors, tensor behind tensor in the order of names: the network's own; its *shared* part,
without tensors that are personal; and what travels, which is the shared part and, with SCAFFOLD,
the control variate before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from minga.federation.parameters import Layout, Parameters
from minga.federation.parts import is_personal, split_personal, with_control
from minga.training.simulation.lesson import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The layouts of one campaign."""

    network: Layout
    travelling: Layout
    is_shared: NDArray[np.bool_]
    """Of each value of the network, whether it travels; shape `(network.num_values,)`."""
    scaffold: bool

    @classmethod
    def of(cls, parameters: Parameters, personal: Sequence[str], *, scaffold: bool) -> Self:
        """Work out the layouts of a network's parameters."""
        shared, _ = split_personal(parameters, personal)
        masks = [
            np.full(parameters[name].size, not is_personal(name, personal))
            for name in sorted(parameters)
        ]
        return cls(
            network=Layout.of(parameters),
            travelling=Layout.of(with_control(shared) if scaffold else shared),
            is_shared=np.concatenate(masks),
            scaffold=scaffold,
        )

    @property
    def has_personal(self) -> bool:
        """Whether devices have tensors of their own."""
        return not bool(self.is_shared.all())

    @property
    def num_shared(self) -> int:
        """How many values of the network travel."""
        return int(self.is_shared.sum())

    def first(self, parameters: Parameters, personal: Sequence[str]) -> Vector:
        """Give what travels first."""
        shared, _ = split_personal(parameters, personal)
        return self.travelling.flatten(with_control(shared) if self.scaffold else shared)

    def control(self, travelling: Vector) -> Vector:
        """Give the control variate of what travels; with SCAFFOLD alone."""
        # Its names begin with "control/", the network's with "model." or "preparation.".
        return travelling[: self.num_shared]

    def shared(self, travelling: Vector) -> Vector:
        """Give the shared part of what travels."""
        return travelling[self.num_shared :] if self.scaffold else travelling
