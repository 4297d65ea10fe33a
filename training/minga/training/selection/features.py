"""Which columns a model needs: those whose loss costs more than that of columns known to be noise.

In each fold trees learn from all columns and, beside each, from a copy of it whose rows are
shuffled. What a column is worth is how much worse the Task's objective gets on examples that were
held out when that column alone is shuffled there (permutation importance: Breiman, Machine Learning
2001). It counts as useful in a fold if it is worth more than every shuffled copy (Kursa and
Rudnicki, "Feature selection with the Boruta package", Journal of Statistical Software 2010), and is
proposed if that holds in most folds. Columns that follow from another one are left out first: trees
would share the worth between them, so that neither seems needed.

At last trees that have only the proposed columns are compared with trees that have all, fold by
fold. While they are worse by more than a standard error, the next best columns are added.

All of this looks at the training split alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minga.training.data.measures import measure_split
from minga.training.data.reading import sample_of_split
from minga.training.document import Document
from minga.training.errors import TaskError
from minga.training.evaluate import measure
from minga.training.progress import OnProgress, Progress, silent
from minga.training.selection.boosting import grow, scores_of
from minga.training.selection.comparison import corrected_error
from minga.training.selection.folds import Fold, folds_of
from minga.training.selection.links import Answer, answer_of, choose_link, linked
from minga.training.task import Split, Task

NUM_FOLDS = 5
NUM_SHUFFLES = 3
MAX_JUDGED = 2000
"""Held-out examples on which columns are shuffled, at most: each column costs a prediction."""

STABLE = 0.8
"""Share of the folds in which a column must be useful to be proposed."""


class Feature(Document):
    """What one column is worth."""

    name: str
    information_bits: float
    """Mutual information with the target, of the column alone."""
    worth: float
    """How much worse the objective gets without it, in the mean over folds."""
    num_useful: int
    """Folds in which it was worth more than every shuffled copy."""
    proposed: bool
    note: str = ""


class FeatureReport(Document):
    """Which columns are proposed, and what that costs."""

    metric: str
    num_folds: int
    features: tuple[Feature, ...]
    """The most useful first."""
    with_all: float
    """The objective of trees that have all columns, in the mean over folds."""
    with_proposed: float
    behind: float
    """How much worse the proposed columns are, in the mean; below 0 if they are better."""
    error: float
    """Standard error of that, corrected for folds that share examples."""

    @property
    def proposed(self) -> tuple[str, ...]:
        """The columns that are proposed, in the order of the table."""
        return tuple(one.name for one in self.features if one.proposed)


@dataclass(frozen=True, slots=True)
class _Course:
    """What is known from the folds."""

    task: Task
    split: Split
    answer: Answer
    folds: Sequence[Fold]
    seed: int

    def value(self, fold: Fold, columns: Sequence[int]) -> float:
        """Give the objective, on held-out examples, of trees that have these columns alone."""
        inputs = self.split.inputs[:, list(columns)]
        grown = self._grown(inputs, fold)
        return self._judged(grown, inputs[fold.judge], fold.judge)

    def worths(self, fold: Fold, columns: Sequence[int]) -> NDArray[np.float64]:
        """Give what columns and then their shuffled copies are worth, shape `(2 * columns,)`."""
        generator = np.random.default_rng(self.seed)
        inputs = self.split.inputs[:, list(columns)]
        copies = np.stack([generator.permutation(column) for column in inputs.T], axis=1)
        both = np.concatenate([inputs, copies], axis=1)
        grown = self._grown(both, fold)
        places = fold.judge
        if len(places) > MAX_JUDGED:
            places = np.sort(generator.choice(places, MAX_JUDGED, replace=False))
        whole = self._judged(grown, both[places], places)
        worths = np.zeros(both.shape[1])
        for column in range(both.shape[1]):
            for _ in range(NUM_SHUFFLES):
                without = both[places]
                without[:, column] = generator.permutation(without[:, column])
                value = self._judged(grown, without, places)
                worths[column] += self.task.objective.gain(whole, value) / NUM_SHUFFLES
        return worths

    def _grown(self, inputs: NDArray[np.float32], fold: Fold) -> object:
        targets = self.split.targets
        learn, choose = fold.learn, fold.choose
        return grow(
            self.answer.kind,
            inputs[learn],
            targets[learn],
            inputs[choose],
            targets[choose],
            seed=self.seed,
        )

    def _judged(self, grown: object, rows: NDArray[np.float32], places: NDArray[np.int64]) -> float:
        raw = scores_of(grown, rows)
        targets = self.split.targets[places]
        link = self.answer.links[0]
        if len(self.answer.links) > 1:
            link = choose_link(self.task, self.answer, raw, Split(inputs=rows, targets=targets))
        outputs = linked(link, raw, self.answer)
        return measure(self.task, outputs, targets)[self.task.objective.metric]


def propose_features(
    task: Task, train: Split, *, seed: int, on_progress: OnProgress = silent
) -> FeatureReport:
    """Propose the columns that a model should go by.

    Args:
        task: has the objective, and says how examples are divided.
        train: the training split, a table.
        seed: of folds, trees and shuffles.
        on_progress: hears of each fold.

    Raises:
        TaskError: the inputs are no table, or the Task has nothing that trees can learn.
        DataError: there are too few examples.
    """
    split = sample_of_split(train)
    if split.inputs.ndim != 2 or split.inputs.dtype.kind != "f":
        raise TaskError(
            f"inputs have shape {split.inputs.shape[1:]} and type {split.inputs.dtype}; columns "
            "can be chosen of a table of floats"
        )
    names = task.columns or tuple(f"x{place}" for place in range(split.inputs.shape[1]))
    folds = folds_of(task, split, num_folds=NUM_FOLDS, seed=seed)
    course = _Course(task, split, answer_of(task, split), folds, seed)
    measures = measure_split(split, names, seed=seed, look_for_noise=False)
    doubles = {second: f"follows from {first}" for first, second in measures.duplicates}
    places = [place for place, name in enumerate(names) if name not in doubles]
    worths, useful = _worths(course, places, on_progress)
    order = sorted(range(len(places)), key=lambda one: (-useful[one], -worths[one]))
    stable = [places[one] for one in order if useful[one] >= STABLE * len(folds)]
    proposed, values = _enough(course, [places[one] for one in order], max(len(stable), 1))
    on_progress(Progress(step="features", done=len(folds) + 1, total=len(folds) + 1))
    ratio = float(np.mean([fold.ratio for fold in folds]))
    bits = {item.name: item.information_bits for item in measures.columns}
    found = [
        Feature(
            name=names[places[one]],
            information_bits=bits.get(names[places[one]], 0.0),
            worth=float(worths[one]),
            num_useful=int(useful[one]),
            proposed=places[one] in proposed,
            note=""
            if (places[one] in proposed) == (places[one] in stable)
            else "needed with the others",
        )
        for one in order
    ]
    found += [
        Feature(
            name=name,
            information_bits=bits.get(name, 0.0),
            worth=0.0,
            num_useful=0,
            proposed=False,
            note=note,
        )
        for name, note in doubles.items()
    ]
    behind = [task.objective.gain(a, b) for a, b in values]
    return FeatureReport(
        metric=task.objective.metric,
        num_folds=len(folds),
        features=tuple(found),
        with_all=float(np.mean([a for a, _ in values])),
        with_proposed=float(np.mean([b for _, b in values])),
        behind=float(np.mean(behind)),
        error=corrected_error(behind, ratio),
    )


def _worths(
    course: _Course, places: Sequence[int], on_progress: OnProgress
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Give each column's mean worth, and the number of folds in which it is useful."""
    total = len(course.folds) + 1
    worths, useful = np.zeros(len(places)), np.zeros(len(places), np.int64)
    for number, fold in enumerate(course.folds, start=1):
        found = course.worths(fold, places)
        own, copies = found[: len(places)], found[len(places) :]
        worths += own / len(course.folds)
        useful += own > max(float(copies.max()), 0.0)
        on_progress(Progress(step="features", done=number, total=total))
    return worths, useful


def _enough(
    course: _Course, ranked: Sequence[int], num_first: int
) -> tuple[set[int], list[tuple[float, float]]]:
    """Take the first columns, and more while the rest is missed.

    Returns:
        the places of the columns, and in each fold the objective with all and with these.
    """
    ratio = float(np.mean([fold.ratio for fold in course.folds]))
    with_all = [course.value(fold, ranked) for fold in course.folds]
    for count in _counts(num_first, len(ranked)):
        chosen = sorted(ranked[:count])
        values = (
            with_all
            if count == len(ranked)
            else [course.value(fold, chosen) for fold in course.folds]
        )
        behind = list(map(course.task.objective.gain, with_all, values))
        if np.mean(behind) <= corrected_error(behind, ratio):
            break
    return set(chosen), list(zip(with_all, values, strict=True))


def _counts(first: int, last: int) -> Iterator[int]:
    """Count from the first to the last number, a half more each time."""
    count = first
    while count < last:
        yield count
        count += max(count // 2, 1)
    yield last
