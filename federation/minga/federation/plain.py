"""Updates that are not masked: the coordinator sees each of them, so devices have to agree."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.errors import PeerError
from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.errors import UpdateError

VALUE: Final = np.dtype("<f4")
"""How one value travels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPlan:
    """The numbers of a plain round.

    Raises:
        PeerError: they cannot work.
    """

    num_values: int
    """Coordinates of the model."""
    max_weight: int
    """A device counts for at most so many examples."""

    def __post_init__(self) -> None:
        if self.num_values < 1 or self.max_weight < 1:
            raise PeerError(
                f"a plain round of {self.num_values} values and weights up to {self.max_weight} "
                "cannot work; both are 1 or more"
            )

    @property
    def upload_size(self) -> int:
        """Bytes of one update."""
        return self.upload_size_of(self.num_values)

    @staticmethod
    def upload_size_of(num_values: int) -> int:
        """Bytes of an update of so many values."""
        return num_values * VALUE.itemsize


def update_to_bytes(delta: NDArray[np.float32]) -> memoryview:
    """Give the bytes of an update, shape `(num_values,)`: its own memory, where possible.

    Raises:
        UpdateError: a value is not finite.
    """
    data = np.ascontiguousarray(delta, VALUE)
    # Block by block: what says of each value whether it is finite would take pages of its own.
    blocks = (data[start : start + BLOCK_VALUES] for start in range(0, data.size, BLOCK_VALUES))
    if not all(np.isfinite(block).all() for block in blocks):
        raise UpdateError(
            "the update holds NaN or infinity; training diverged: lower its learning rate"
        )
    return data.view(np.uint8).data
