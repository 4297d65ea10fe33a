"""Which virtual device has which examples.

All of it is drawn from a seed: the same data, table and seed give the same devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.data import read_splits
from minga.training.errors import DataError
from minga.training.schema import iterate_columns
from minga.training.simulation.config import (
    ColumnTable,
    DirichletTable,
    EqualTable,
    PartitionTable,
    SourcesTable,
)
from minga.training.task import Split, Splits, Task

Places = NDArray[np.int64]
"""Where a device's examples are in a split, shape `(n,)`."""

MAX_CLASSES = 1000
"""Targets with more different values are no classes that devices could have a mix of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """All devices and their examples, each example stored once."""

    names: tuple[str, ...]
    train: Split
    train_of: tuple[Places, ...]
    """Each device's examples to learn from, at least one."""
    validation: Split
    validation_of: tuple[Places, ...]
    """Each device's examples to measure by; there may be none."""

    def __len__(self) -> int:
        return len(self.names)

    def splits_of(self, device: int) -> Splits:
        """Give one device's data as its trainer gets it."""
        validation = _taken(self.validation, self.validation_of[device])
        return Splits(
            train=_taken(self.train, self.train_of[device]), validation=validation, test=validation
        )


def populate(
    task: Task, splits: Splits, table: PartitionTable, *, seed: int, root: Path = Path()
) -> Population:
    """Divide the training and the validation split among devices.

    Args:
        task: reads sources, and names columns.
        splits: of the whole; only the test split goes to nobody.
        table: how to divide.
        seed: of all that is drawn.
        root: where patterns of sources start.

    Raises:
        DataError: it cannot be divided so.
    """
    match table:
        case EqualTable():
            classes = (np.zeros(len(splits.train), int), np.zeros(len(splits.validation), int))
            return _by_mix(splits, table, classes, None, seed)
        case DirichletTable():
            return _by_mix(splits, table, _classes(splits), table.alpha, seed)
        case ColumnTable():
            return _by_column(task, splits, table.column)
        case SourcesTable():
            return _by_source(task, table.pattern, root)


def _taken(split: Split, places: Places) -> Split:
    return Split(inputs=split.inputs[places], targets=split.targets[places])


# --- mixes ------------------------------------------------------------------------------------


def _classes(splits: Splits) -> tuple[Places, Places]:
    """Number the classes of both splits' targets alike."""
    targets = [splits.train.targets, splits.validation.targets]
    if any(array.ndim != 1 for array in targets):
        raise DataError(
            f"targets of shape {targets[0].shape} have no classes to mix; "
            'use [simulation.partition] name = "iid" or "column"'
        )
    values, numbers = np.unique(np.concatenate(targets), return_inverse=True)
    if len(values) > MAX_CLASSES:
        raise DataError(
            f"targets have {len(values)} different values, too many for classes; "
            'use [simulation.partition] name = "iid" or "column"'
        )
    return numbers[: len(targets[0])], numbers[len(targets[0]) :]


def _by_mix(
    splits: Splits,
    table: EqualTable | DirichletTable,
    classes: tuple[Places, Places],
    alpha: float | None,
    seed: int,
) -> Population:
    """Give each device a mix of classes and examples by it.

    The mixes are Dirichlet around the whole's own: Hsu, Qi and Brown, "Measuring the effects of
    non-identical data distribution for federated visual classification", 2019, section 3. A
    device's validation examples are drawn by its mix too, with repetition, in proportion.
    """
    rng = np.random.default_rng([seed, 1])
    num_train = len(splits.train)
    sizes = _sizes(table, num_train, rng)
    num_classes = 1 + max(int(numbers.max(initial=0)) for numbers in classes)
    prior = np.bincount(classes[0], minlength=num_classes) / num_train
    if alpha is None:
        mixes = np.tile(prior, (table.devices, 1))
    else:
        mixes = _dirichlet(alpha * num_classes * prior, table.devices, rng)
    pools = _pools(classes[0], num_classes, rng)
    deal = _draw if table.examples else _dealer(pools)
    train_of = tuple(deal(pools, mix, size, rng) for mix, size in zip(mixes, sizes, strict=True))
    pools = _pools(classes[1], num_classes, rng)
    shares = np.maximum(1, np.rint(sizes * (len(splits.validation) / num_train))).astype(int)
    validation_of = tuple(
        _draw(pools, mix, size, rng) for mix, size in zip(mixes, shares, strict=True)
    )
    return Population(
        names=_names(table.devices),
        train=splits.train,
        train_of=train_of,
        validation=splits.validation,
        validation_of=validation_of,
    )


def _sizes(
    table: EqualTable | DirichletTable, num_examples: int, rng: np.random.Generator
) -> Places:
    """Say how many examples each device has: equally many, or log-normally spread."""
    if not table.examples and num_examples < table.devices:
        raise DataError(
            f"{num_examples} training examples are too few for {table.devices} devices; lower "
            "[simulation.partition] devices, or set examples to let devices draw with repetition"
        )
    weights = np.exp(table.size_spread * rng.standard_normal(table.devices))
    if table.examples:
        drawn: Places = np.maximum(1, np.rint(weights * table.examples)).astype(np.int64)
        return drawn
    # Each has one; the rest goes by weight, and what rounding leaves to the first ones.
    ends = np.cumsum(weights / weights.sum()) * (num_examples - table.devices)
    divided: Places = 1 + np.diff(np.rint(ends).astype(np.int64), prepend=0)
    return divided


def _dirichlet(
    concentration: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw mixes; a class that nobody has stays at zero."""
    mixes = np.zeros((count, len(concentration)))
    present = concentration > 0
    mixes[:, present] = rng.dirichlet(concentration[present], count)
    return mixes


def _pools(classes: Places, num_classes: int, rng: np.random.Generator) -> list[Places]:
    """Give the examples of each class, shuffled."""
    order = rng.permutation(len(classes))
    return [order[classes[order] == number] for number in range(num_classes)]


def _draw(
    pools: Sequence[Places], mix: NDArray[np.float64], size: int, rng: np.random.Generator
) -> Places:
    """Draw examples by a mix, with repetition; a class without examples counts for none."""
    mix = np.where([len(pool) > 0 for pool in pools], mix, 0.0)
    if mix.sum() == 0.0:
        return np.zeros(0, np.int64)
    counts = rng.multinomial(size, mix / mix.sum())
    return np.concatenate(
        [rng.choice(pool, count) for pool, count in zip(pools, counts, strict=True) if count]
    )


def _dealer(pools: Sequence[Places]) -> Any:
    """Give a function as `_draw` that gives each example out once."""
    dealt = np.zeros(len(pools), np.int64)
    lengths = np.array([len(pool) for pool in pools])

    def deal(
        pools: Sequence[Places], mix: NDArray[np.float64], size: int, rng: np.random.Generator
    ) -> Places:
        taken: list[Places] = []
        while size > 0:
            left = lengths - dealt
            wanted = np.where(left > 0, mix, 0.0)
            if wanted.sum() < 1e-12:  # its classes are used up: it gets of what is left
                wanted = left.astype(np.float64)
            counts = np.minimum(rng.multinomial(size, wanted / wanted.sum()), left)
            taken += [
                pool[start : start + count]
                for pool, start, count in zip(pools, dealt, counts, strict=True)
            ]
            dealt[:] += counts
            size -= int(counts.sum())
        return np.concatenate(taken)

    return deal


# --- owners and sources -----------------------------------------------------------------------


def _by_column(task: Task, splits: Splits, column: str) -> Population:
    """Make one device of each value that a column has in the training split."""
    owners = [_column(task, split, column) for split in (splits.train, splits.validation)]
    values = np.unique(owners[0])
    if len(values) < 2:
        raise DataError(f"{column or 'owners'} has one value alone; a federation needs several")
    train_of, validation_of = (_places(values, owner) for owner in owners)
    return Population(
        names=tuple(f"{column or 'owner'}-{value}" for value in values),
        train=splits.train,
        train_of=train_of,
        validation=splits.validation,
        validation_of=validation_of,
    )


def _column(task: Task, split: Split, column: str) -> NDArray[Any]:
    if not column:
        if split.owners is None:
            raise DataError(
                "the Task's splits do not say whose examples they have; give Split(owners=...), "
                "or name a column in [simulation.partition]"
            )
        return split.owners
    found = dict(iterate_columns(split.inputs, task.columns))
    if column not in found:
        known = ", ".join(task.columns) or "none"
        raise DataError(f"{column!r} is no column of the inputs; the Task's columns: {known}")
    return found[column]


def _places(values: NDArray[Any], owners: NDArray[Any]) -> tuple[Places, ...]:
    """Give the places of each value among owners, in their order."""
    order = np.argsort(owners, kind="stable")
    ordered = owners[order]
    starts = np.searchsorted(ordered, values, "left")
    ends = np.searchsorted(ordered, values, "right")
    return tuple(order[start:end] for start, end in zip(starts, ends, strict=True))


def _by_source(task: Task, pattern: str, root: Path) -> Population:
    paths = sorted(root.glob(pattern))
    if len(paths) < 2:
        raise DataError(
            f"{pattern} matches {len(paths)} sources in {root}; a federation needs several"
        )
    sites = [read_splits(task, str(path)) for path in paths]
    train, train_of = _joined([site.train for site in sites])
    validation, validation_of = _joined([site.validation for site in sites])
    return Population(
        names=tuple(path.stem for path in paths),
        train=train,
        train_of=train_of,
        validation=validation,
        validation_of=validation_of,
    )


def _joined(splits: Sequence[Split]) -> tuple[Split, tuple[Places, ...]]:
    """Put splits behind each other and say where each one is."""
    ends = np.cumsum([0, *map(len, splits)])
    try:
        joined = Split(
            inputs=np.concatenate([split.inputs for split in splits]),
            targets=np.concatenate([split.targets for split in splits]),
        )
    except ValueError as error:
        raise DataError(f"the sources have examples of different shapes: {error}") from error
    return joined, tuple(np.arange(low, high) for low, high in pairwise(ends))


def _names(count: int) -> tuple[str, ...]:
    width = len(str(count - 1))
    return tuple(f"device-{number:0{width}}" for number in range(count))
