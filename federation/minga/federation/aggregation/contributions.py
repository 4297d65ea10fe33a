"""What a rule combines: mean updates, one for each device or group, read block by block.

Whoever sent a contribution may have lied about it. So it is looked through once before any rule
sees it: one with another length, a weight that is no positive number, NaN or infinity is left out,
by name, and the others are measured. Sums are taken in float64, in which no square of a float32
overflows.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from minga.federation.memory import BLOCK_VALUES

Vector = NDArray[np.float32]
"""A part of a model's values, shape `(n,)`."""

Wide = NDArray[np.float64]
"""A vector or matrix while it is computed with."""

_Result = TypeVar("_Result")

BLOCK_BYTES: Final = 32 << 20
"""What the blocks of all contributions take together, whatever their number and the model."""

_VALUE: Final = np.dtype("<f4")

_BYTES_PER_VALUE: Final = 16
"""A value is held as float32 and as float64, and once more while it is squared or sorted."""


class Contribution(Protocol):
    """One mean update and how much it counts."""

    @property
    def name(self) -> str:
        """Whose it is: a device, or a group of devices."""
        ...

    @property
    def num_values(self) -> int:
        """Its length."""
        ...

    @property
    def weight(self) -> int:
        """How many examples are behind it, as far as its sender says."""
        ...

    def read(self, start: int, stop: int) -> Vector:
        """Give the values from `start` to before `stop`; the same ones each time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VectorContribution:
    """A contribution that is an array: in memory, or a file that is mapped there."""

    name: str
    values: Vector
    weight: int
    factor: float = 1.0
    """Values are scaled by it as they are read."""

    @property
    def num_values(self) -> int:
        """Its length."""
        return self.values.size

    def read(self, start: int, stop: int) -> Vector:
        """Give the values from `start` to before `stop`."""
        values = self.values[start:stop]
        return values if self.factor == 1.0 else values * np.float32(self.factor)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FileContribution:
    """A contribution that is a file of little-endian float32.

    It is not mapped: pages of a mapped file that were read count as this process's memory, for as
    long as any of it is in use.
    """

    name: str
    path: Path
    num_values: int
    weight: int
    factor: float = 1.0
    """Values are scaled by it as they are read."""

    def read(self, start: int, stop: int) -> Vector:
        """Give the values from `start` to before `stop`.

        Raises:
            OSError: it cannot be read.
        """
        count, offset = stop - start, start * _VALUE.itemsize
        values: Vector = np.fromfile(self.path, _VALUE, count, offset=offset)
        if self.factor != 1.0:
            values *= np.float32(self.factor)
        return values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What one look through all contributions found."""

    sound: tuple[Contribution, ...]
    """Those that can be combined, in the order given."""
    rejected: Mapping[str, str]
    """Who was left out, and why."""
    products: Wide
    """Inner products of the sound ones, shape `(n, n)`; those of different ones are zero unless
    they were asked for."""

    @property
    def norms(self) -> Wide:
        """Euclidean lengths of the sound ones, shape `(n,)`."""
        return np.sqrt(np.diagonal(self.products))

    @property
    def weights(self) -> Wide:
        """Their weights, shape `(n,)`."""
        return np.array([contribution.weight for contribution in self.sound], np.float64)


def blocks(num_values: int, num_contributions: int, block_bytes: int) -> Iterator[slice]:
    """Cut a model into blocks; those of all contributions together take at most `block_bytes`.

    A block has one value at least, so it may take more with a great many contributions.
    """
    size = max(1, block_bytes // (_BYTES_PER_VALUE * max(1, num_contributions)))
    for start in range(0, num_values, size):
        yield slice(start, min(start + size, num_values))


def single_blocks(num_values: int, block_bytes: int) -> Iterator[slice]:
    """Cut a model into blocks that are read of one contribution at a time."""
    return blocks(num_values, 1, min(block_bytes, BLOCK_VALUES * _BYTES_PER_VALUE))


def survey(
    contributions: Sequence[Contribution],
    num_values: int,
    *,
    all_products: bool,
    block_bytes: int = BLOCK_BYTES,
) -> Survey:
    """Look through contributions once: leave out what cannot be combined, measure the rest.

    Args:
        contributions: what came, under different names.
        num_values: the model's length.
        all_products: whether the products of different contributions are wanted too, which takes
            time of the order of n² times the model.
        block_bytes: how much memory blocks may take.
    """
    fitting, rejected = sort_out(contributions, num_values)
    if all_products:
        finite, products = _all_products(fitting, num_values, block_bytes)
    else:
        squares = _squares(fitting, num_values, block_bytes)
        finite, products = np.isfinite(squares), np.diag(squares)
    for one, is_finite in zip(fitting, finite, strict=True):
        if not is_finite:
            rejected[one.name] = "it holds NaN or infinity"
    return Survey(
        sound=tuple(one for one in fitting if one.name not in rejected),
        rejected=rejected,
        products=products[np.ix_(finite, finite)],
    )


def sort_out(
    contributions: Sequence[Contribution], num_values: int
) -> tuple[list[Contribution], dict[str, str]]:
    """Tell contributions that can be read as updates of a model from those that cannot, and why.

    Args:
        contributions: what came, under different names.
        num_values: the model's length.
    """
    rejected = {
        one.name: reason
        for one in contributions
        if (reason := _misfit(one, num_values)) is not None
    }
    return [one for one in contributions if one.name not in rejected], rejected


def _squares(fitting: Sequence[Contribution], num_values: int, block_bytes: int) -> Wide:
    """Give squared lengths; they are finite exactly if all values are: see the module's text."""

    def square(block: slice) -> list[float]:
        parts = (one.read(block.start, block.stop).astype(np.float64) for one in fitting)
        return [float(part @ part) for part in parts]

    total = np.zeros(len(fitting))
    for squares in in_parallel(square, single_blocks(num_values, block_bytes)):
        total += squares
    return total


def in_parallel(work: Callable[[slice], _Result], pieces: Iterable[slice]) -> list[_Result]:
    """Work on blocks on all cores; numpy leaves the interpreter's lock. In order."""
    pieces = list(pieces)
    if len(pieces) == 1:  # threads would take longer than a small model does
        return [work(pieces[0])]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, pieces))


def _all_products(
    fitting: Sequence[Contribution], num_values: int, block_bytes: int
) -> tuple[NDArray[np.bool_], Wide]:
    """Say which contributions are finite, and give all inner products of those."""
    num = len(fitting)
    finite, products = np.ones(num, bool), np.zeros((num, num))
    for block in blocks(num_values, num, block_bytes):
        rows = np.zeros((num, block.stop - block.start))
        for place, (row, one) in enumerate(zip(rows, fitting, strict=True)):
            if finite[place]:
                row[:] = one.read(block.start, block.stop)
                finite[place] = np.isfinite(row).all()
            if not finite[place]:
                row[:] = 0.0
        products += rows @ rows.T
    return finite, products


def _misfit(contribution: Contribution, num_values: int) -> str | None:
    if contribution.num_values != num_values:
        return f"it has {contribution.num_values} values, the model {num_values}"
    if contribution.weight < 1:
        return f"its weight is {contribution.weight}; it must be 1 or more"
    return None
