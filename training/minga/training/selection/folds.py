"""How examples are divided for cross-validation: by chance, by owner, or by time.

Examples that belong together would tell a model in training what it is judged by; so the Task says
what they are (`Task.folds`): `shuffled` if each stands for itself (classes in equal shares),
`grouped` if those of an owner belong together (`Split.owners`), `ordered` if they are sorted by
time: then a model is judged on what came after all that it learned from.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minga.training.data.reading import sample_of_split
from minga.training.errors import DataError
from minga.training.schema import MAX_CATEGORIES
from minga.training.task import Split, Splits, Task

CHOOSING = 0.15
"""Share of a fold's examples to learn from that says when to stop."""

MIN_JUDGED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Places of the examples to learn from, to stop by, and to judge by."""

    learn: NDArray[np.int64]
    choose: NDArray[np.int64]
    judge: NDArray[np.int64]

    @property
    def ratio(self) -> float:
        """Examples to judge by for each one that was learned from or stopped by."""
        return len(self.judge) / (len(self.learn) + len(self.choose))


def development_of(task: Task, splits: Splits) -> Split:
    """Join the training and the validation split; the test split stays untouched.

    Of data that stays on the disk it is a sample.

    Raises:
        DataError: the Task's folds are by owner, and examples have none.
    """
    parts = [sample_of_split(split) for split in (splits.train, splits.validation)]
    owners = [part.owners for part in parts]
    if task.folds == "grouped" and any(one is None for one in owners):
        raise DataError(
            f'{type(task).__name__}.folds is "grouped", but its examples have no owners; give '
            "Split(inputs=..., targets=..., owners=...) in training and validation splits"
        )
    return Split(
        inputs=np.concatenate([np.asarray(part.inputs) for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
        owners=np.concatenate([one for one in owners if one is not None])
        if all(one is not None for one in owners)
        else None,
    )


def folds_of(
    task: Task, split: Split, *, num_folds: int, repeats: int = 1, seed: int
) -> tuple[Fold, ...]:
    """Divide examples; the seed decides how.

    Args:
        task: says what belongs together.
        split: all examples.
        num_folds: of each repetition.
        repeats: how often they are divided anew; what is sorted by time is divided once.
        seed: of the division.

    Raises:
        DataError: there are too few examples, or too few owners, for so many folds.
    """
    try:
        found = tuple(_folds(task, split, num_folds, repeats, seed))
    except ValueError as error:
        raise DataError(
            f"{len(split)} examples cannot be divided into {num_folds} folds: {error}"
        ) from error
    smallest = min(min(len(fold.judge), len(fold.learn), len(fold.choose)) for fold in found)
    if smallest < MIN_JUDGED:
        raise DataError(
            f"{num_folds} folds of {len(split)} examples leave parts of {smallest}; give more "
            "examples, or set [selection] folds lower"
        )
    return found


def part(split: Split, places: NDArray[np.int64]) -> Split:
    """Take examples out of a split."""
    owners = None if split.owners is None else split.owners[places]
    return Split(inputs=split.inputs[places], targets=split.targets[places], owners=owners)


def _folds(task: Task, split: Split, num_folds: int, repeats: int, seed: int) -> Iterator[Fold]:
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, TimeSeriesSplit

    everything = np.arange(len(split))
    if task.folds == "ordered":
        for learn, judge in TimeSeriesSplit(num_folds).split(everything):
            start = len(learn) - max(round(len(learn) * CHOOSING), 1)
            yield Fold(learn=learn[:start], choose=learn[start:], judge=judge)
        return
    labels = _classes(split, num_folds)
    for repeat in range(repeats):
        if task.folds == "grouped":
            divided = GroupKFold(num_folds, shuffle=True, random_state=seed + repeat)
        elif labels is not None:
            divided = StratifiedKFold(num_folds, shuffle=True, random_state=seed + repeat)
        else:
            divided = KFold(num_folds, shuffle=True, random_state=seed + repeat)
        owners = split.owners if task.folds == "grouped" else None
        for learn, judge in divided.split(everything, labels, owners):
            inner, choose = _apart(task, split, learn, labels, seed + repeat)
            yield Fold(learn=inner, choose=choose, judge=judge)


def _apart(
    task: Task,
    split: Split,
    places: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put a share of examples aside to stop by, by the same rule."""
    from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit

    if task.folds == "grouped":
        assert split.owners is not None
        divided = GroupShuffleSplit(1, test_size=CHOOSING, random_state=seed)
        found = divided.split(places, groups=split.owners[places])
    elif labels is not None:
        divided = StratifiedShuffleSplit(1, test_size=CHOOSING, random_state=seed)
        found = divided.split(places, labels[places])
    else:
        found = ShuffleSplit(1, test_size=CHOOSING, random_state=seed).split(places)
    learn, choose = next(iter(found))
    return places[learn], places[choose]


def _classes(split: Split, num_folds: int) -> NDArray[np.int64] | None:
    """Number the classes, if targets are classes with enough examples for every fold."""
    if split.targets.ndim != 1:
        return None
    values, codes = np.unique(split.targets, return_inverse=True)
    if len(values) > MAX_CATEGORIES or np.bincount(codes).min() < 2 * num_folds:
        return None
    return codes.astype(np.int64)
