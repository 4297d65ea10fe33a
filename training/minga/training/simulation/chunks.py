"""Which devices train together, and on which examples in each step.

Devices are sorted by their numbers of steps, the longest first, so that those that still learn are
the first ones of a chunk in every step; nothing is computed for those that are done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, zip_longest
from typing import Final

import numpy as np

from minga.training.loop import batch_places, epoch_seed
from minga.training.simulation.partition import Places

STEP_DEVICES: Final = 16
"""To call the operations of a step takes about as long as to compute it for so many devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the first devices of a chunk: those that have so many."""

    columns: slice
    """Where its examples are among `Chunk.places`."""
    sizes: tuple[int, ...]
    """How many of them count on each device; they come first, and the rest is padding."""

    @property
    def num_devices(self) -> int:
        """How many devices learn in it."""
        return len(self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Devices that train together."""

    rows: Places
    """Which of all devices they are; those with the most steps come first."""
    places: Places
    """The examples of all steps, one step behind the other, shape `(num_devices, num_examples)`.
    Padding is a device's first example: it is as finite as the others are."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The batches of a device with so many examples, of all epochs."""

    places: Places
    """Of its own examples, one batch behind the other."""
    sizes: tuple[int, ...]
    """How many examples each batch has."""


@lru_cache(maxsize=4096)
def plan_of(num_examples: int, batch_size: int, epochs: int, seed: int) -> Plan:
    """Give the batches of a device: those that the training loop would give it."""
    batches = [
        part.numpy()
        for epoch in range(epochs)
        for part in batch_places(num_examples, batch_size, epoch_seed(seed, epoch))
    ]
    return Plan(places=np.concatenate(batches), sizes=tuple(map(len, batches)))


def in_order(plans: Sequence[Plan]) -> list[int]:
    """Sort devices by their numbers of steps, and then of examples, the longest first."""
    return sorted(
        range(len(plans)),
        key=lambda row: (len(plans[row].sizes), len(plans[row].places)),
        reverse=True,
    )


def alike(rows: Sequence[int], plans: Sequence[Plan]) -> Iterator[list[int]]:
    """Put sorted devices together as long as that takes less than to part them.

    To carry those along that are done costs something in each step; so does each step of its own.
    """
    found: list[int] = []
    for num_steps, group in groupby(rows, key=lambda row: len(plans[row].sizes)):
        more = list(group)
        if found:
            idle = len(plans[found[0]].sizes) - num_steps
            if len(more) * idle > STEP_DEVICES * num_steps:
                yield found
                found = []
        found += more
    if found:
        yield found


def chunk_of(rows: Sequence[int], examples: Sequence[Places], plans: Sequence[Plan]) -> Chunk:
    """Lay out the steps of some devices.

    Args:
        rows: which devices, sorted.
        examples: of all devices.
        plans: likewise.
    """
    own = [plans[row] for row in rows]
    sizes = [
        tuple(size for size in step if size)
        for step in zip_longest(*(p.sizes for p in own), fillvalue=0)
    ]
    ends = list(accumulate(map(max, sizes), initial=0))
    if all(plan is own[0] for plan in own):
        places = np.stack([examples[row] for row in rows])[:, own[0].places]
    else:
        places = np.empty((len(rows), ends[-1]), np.int64)
        for line, row, plan in zip(places, rows, own, strict=True):
            line[:] = examples[row][0]
            line[_columns(plan, ends)] = examples[row][plan.places]
    steps = tuple(
        Step(columns=slice(low, high), sizes=step)
        for low, high, step in zip(ends, ends[1:], sizes, strict=False)
    )
    return Chunk(rows=np.array(rows), places=places, steps=steps)


def _columns(plan: Plan, starts: Sequence[int]) -> Places:
    """Give the columns of a device's batches, where each step of its chunk starts as said."""
    before = accumulate(plan.sizes, initial=0)
    shifts = [start - low for start, low in zip(starts, before, strict=False)]
    columns: Places = np.arange(len(plan.places))
    columns += np.repeat(shifts[: len(plan.sizes)], plan.sizes)
    return columns
