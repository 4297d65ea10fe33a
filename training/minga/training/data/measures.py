"""What a table's columns tell of the target, and which columns and labels look wrong.

Entropies and mutual information are in bits, of columns cut into at most `NUM_BINS` bins of equal
counts; they are plug-in estimates with the correction of Miller (1955). Suspected label noise is
confident learning (Northcutt, Jiang, Chuang, JAIR 2021): examples of which a model that did not
learn from them is surer that they belong to another class than is usual for that class.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.document import Document
from minga.training.schema import MAX_CATEGORIES, MAX_COLUMNS, iterate_columns
from minga.training.stored import sample_places
from minga.training.task import Split

NUM_BINS = 20
NEAR_CONSTANT = 0.99
"""Share of its most frequent value from which on a column is called near-constant."""

DUPLICATE = 0.9999
"""Correlation from which on two columns are called duplicates."""

MAX_DUPLICATE_EXAMPLES = 20_000

NUM_FOLDS = 5
MAX_NOISE_EXAMPLES = 50_000
"""Label noise is looked for among at most so many examples, the first ones."""

MIN_CLASS_EXAMPLES = 2 * NUM_FOLDS


class ColumnMeasure(Document):
    """What one column of the inputs tells."""

    name: str
    entropy_bits: float
    information_bits: float
    """Mutual information with the target, at least 0."""
    share_of_target: float
    """The same as a share of the target's entropy, 0 to 1."""
    top_share: float
    """Share of the most frequent value."""
    missing: float


class SuspectedLabel(Document):
    """An example whose label a model doubts that did not learn from it."""

    index: int
    """In the training split."""
    given: float
    likely: float
    confidence: float
    """Of the model in the likely label, 0 to 1."""


class Measures(Document):
    """The measures of a training split."""

    num_examples: int
    target_entropy_bits: float
    columns: tuple[ColumnMeasure, ...]
    near_constant: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]
    suspected_labels: tuple[SuspectedLabel, ...] = ()
    """The surest first."""
    noise_note: str = ""
    """Why label noise was not looked for, or among which examples."""


def measure_split(
    split: Split, names: Sequence[str] = (), *, seed: int = 0, look_for_noise: bool = True
) -> Measures:
    """Measure a training split of shape `(n, columns)`, or of images as one column.

    Args:
        split: the training split.
        names: of the columns.
        seed: of the folds.
        look_for_noise: cross-validate a model to find labels that are suspect; takes seconds.
    """
    is_table = split.inputs.ndim == 2 and split.inputs.shape[1] <= MAX_COLUMNS
    targets = split.targets if split.targets.ndim == 1 else None
    columns = dict(iterate_columns(split.inputs, names)) if is_table else {}
    target_codes = None if targets is None else codes_of(targets.astype(np.float64))
    suspected: tuple[SuspectedLabel, ...] = ()
    note = "not looked for"
    if look_for_noise:
        suspected, note = suspected_labels(split, seed=seed)
    measured = tuple(_measure(name, values, target_codes) for name, values in columns.items())
    return Measures(
        num_examples=len(split),
        target_entropy_bits=entropy(target_codes) if target_codes is not None else 0.0,
        columns=measured,
        near_constant=tuple(item.name for item in measured if item.top_share >= NEAR_CONSTANT),
        duplicates=duplicate_columns(columns),
        suspected_labels=suspected,
        noise_note=note,
    )


def entropy(codes: NDArray[np.int64]) -> float:
    """Give the entropy in bits of bins numbered from 0, as they are, without a correction."""
    counts = np.bincount(codes)
    shares = counts[counts > 0] / len(codes)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def mutual_information(codes: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Give the mutual information in bits of two numberings of the same examples, at least 0.

    The bias of the plug-in estimate, (a - 1)(b - 1) / (2 n ln 2) for a and b occupied bins that are
    independent, is taken off (Miller 1955).
    """
    joint = codes * (int(others.max(initial=0)) + 1) + others
    _, joint = np.unique(joint, return_inverse=True)
    plain = entropy(codes) + entropy(others) - entropy(joint)
    a, b = len(np.unique(codes)), len(np.unique(others))
    bias = (a - 1) * (b - 1) / (2 * len(codes) * math.log(2))
    return max(plain - bias, 0.0)


def codes_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number the bins of values, shape `(n,)`: few values each their own, many by quantiles.

    Missing values are a bin of their own, the last.
    """
    present = values[np.isfinite(values)]
    distinct = np.unique(present)
    if len(distinct) <= MAX_CATEGORIES:
        edges = (distinct[1:] + distinct[:-1]) / 2
    else:
        edges = np.unique(np.quantile(present, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    codes = np.searchsorted(edges, values, side="right")
    return np.where(np.isfinite(values), codes, len(edges) + 1).astype(np.int64)


def duplicate_columns(columns: dict[str, NDArray[np.float64]]) -> tuple[tuple[str, str], ...]:
    """Find pairs of columns of which one follows from the other by scaling, in a sample.

    A missing value counts as the column's mean: doubles have their holes at the same places.
    """
    if len(columns) < 2:
        return ()
    names = list(columns)
    places = sample_places(len(columns[names[0]]), MAX_DUPLICATE_EXAMPLES)
    table = np.stack([_centred(columns[name][places]) for name in names])
    norms = np.maximum(np.linalg.norm(table, axis=1), 1e-300)
    correlations = np.abs((table @ table.T) / np.outer(norms, norms))
    pairs = np.argwhere(np.triu(correlations >= DUPLICATE, k=1))
    return tuple((names[first], names[second]) for first, second in pairs)


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    is_present = np.isfinite(values)
    if not is_present.any():
        return np.zeros_like(values)
    return np.where(is_present, values - values[is_present].mean(), 0.0)


def suspected_labels(split: Split, *, seed: int = 0) -> tuple[tuple[SuspectedLabel, ...], str]:
    """Find examples whose label is suspect; see the module.

    Returns:
        the examples, the surest first, and among which examples, or why none, were looked at.
    """
    labels = split.targets
    classes, codes = np.unique(labels, return_inverse=True)
    if labels.ndim != 1 or len(classes) > MAX_CATEGORIES or not _is_whole(classes):
        return (), "the target is no class"
    if np.bincount(codes).min() < MIN_CLASS_EXAMPLES or len(classes) < 2:
        return (), f"a class has fewer than {MIN_CLASS_EXAMPLES} examples"
    count = min(len(labels), MAX_NOISE_EXAMPLES)
    probabilities = _out_of_fold(split.inputs[:count].reshape(count, -1), codes[:count], seed)
    likely, confidence = _confidently_other(codes[:count], probabilities)
    order = np.flatnonzero(likely >= 0)
    order = order[np.argsort(-confidence[order], kind="stable")]
    found = tuple(
        SuspectedLabel(
            index=int(index),
            given=float(classes[codes[index]]),
            likely=float(classes[likely[index]]),
            confidence=float(confidence[index]),
        )
        for index in order
    )
    return found, f"among {count} examples, by {NUM_FOLDS}-fold cross-validation"


def _confidently_other(
    codes: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give each example's other class that it confidently belongs to (-1 if none), and how surely.

    An example counts for a class if its probability reaches that class's mean over the examples
    labelled so: the confident joint of Northcutt et al., equation 1, and its off-diagonal.
    """
    num_classes = probabilities.shape[1]
    thresholds = np.array([probabilities[codes == c, c].mean() for c in range(num_classes)])
    reaches = probabilities >= thresholds
    best = np.where(reaches, probabilities, -1.0).argmax(axis=1)
    is_other = reaches.any(axis=1) & (best != codes)
    rows = np.arange(len(codes))
    is_other &= probabilities[rows, best] > probabilities[rows, codes]
    return np.where(is_other, best, -1), probabilities[rows, best]


def _out_of_fold(inputs: NDArray[Any], codes: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Give class probabilities of each example by a model that did not learn from it."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=15, learning_rate=0.1, l2_regularization=1.0, random_state=seed
    )
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    # Two threads that wait for each other beside other work were ten times slower than one.
    with threadpool_limits(1):
        found = cross_val_predict(model, inputs, codes, cv=folds, method="predict_proba")
    return np.asarray(found, np.float64)


def _measure(
    name: str, values: NDArray[np.float64], target: NDArray[np.int64] | None
) -> ColumnMeasure:
    codes = codes_of(values)
    information = mutual_information(codes, target) if target is not None else 0.0
    whole = entropy(target) if target is not None else 0.0
    present = values[np.isfinite(values)]
    _, counts = np.unique(present, return_counts=True)
    return ColumnMeasure(
        name=name,
        entropy_bits=entropy(codes),
        information_bits=information,
        share_of_target=min(information / whole, 1.0) if whole > 0 else 0.0,
        top_share=float(counts.max() / len(values)) if len(counts) else 1.0,
        missing=1 - len(present) / max(len(values), 1),
    )


def _is_whole(values: NDArray[Any]) -> bool:
    return bool(np.all(np.isfinite(values)) and np.all(values == np.round(values)))
