"""What devices are told in a round, and what they learnt, as vectors.

A device's parameters are one vector in the order of the network's layout, so those of many devices
are one matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from minga.federation.parameters import Layout, Parameters
from minga.federation.trainer import Scalar

Vector = NDArray[np.float32]
"""All parameters of one network, shape `(num_values,)`."""

Matrix = NDArray[np.float32]
"""One row for each device, shape `(num_devices, n)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What some devices start from and how they train."""

    start: Vector
    """The parameters that all of them start from."""
    config: Mapping[str, Scalar]
    """What the trainer is told, as in a campaign's plan."""
    own: Matrix | None = None
    """Each device's own values, for the places where `is_own`; None: nobody has any."""
    is_own: NDArray[np.bool_] | None = None
    """Which values are devices' own, shape `(num_values,)`."""
    corrections: Matrix | None = None
    """What is added to each device's gradients (SCAFFOLD); None: nothing."""

    def of(self, rows: NDArray[np.int64]) -> "Lesson":
        """Give the lesson of some of the devices."""
        return Lesson(
            start=self.start,
            config=self.config,
            own=None if self.own is None else self.own[rows],
            is_own=self.is_own,
            corrections=None if self.corrections is None else self.corrections[rows],
        )

    def start_of(self, row: int) -> Vector:
        """Give what one device starts from."""
        if self.own is None or self.is_own is None:
            return self.start
        start = self.start.copy()
        start[self.is_own] = self.own[row]
        return start

    def starts(self, columns: slice) -> Matrix:
        """Give what devices start from in some places, shape `(num_devices or 1, n)`."""
        part = self.start[None, columns]
        if self.own is None or self.is_own is None or not self.is_own[columns].any():
            return part
        return self.own_part(columns)

    def own_part(self, columns: slice) -> Matrix:
        """Give devices' own values in places that are all their own."""
        assert self.own is not None
        assert self.is_own is not None
        before = int(self.is_own[: columns.start].sum())
        return self.own[:, before : before + columns.stop - columns.start]

    def correction_of(self, row: int, layout: Layout) -> Parameters | None:
        """Give the correction of one device's gradients."""
        return None if self.corrections is None else layout.unflatten(self.corrections[row])


class Way(Enum):
    """How devices were trained; all ways lead to the same, up to rounding."""

    ONE_BY_ONE = "one by one"
    FUNCTIONAL = "together, any network by torch.func"
    DENSE = "together, dense layers by batched products"
    DESCENT = "together, plain descent of dense layers without gradients"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What some devices made of a lesson, in their order."""

    deltas: Matrix
    """How each one's parameters changed, shape `(num_devices, num_values)`."""
    gradients: Matrix | None = None
    """The mean of each one's uncorrected gradients, where they were corrected."""
    way: Way
    failures: Mapping[int, str] = field(default_factory=dict)
    """Rows that came to nothing, and why."""
