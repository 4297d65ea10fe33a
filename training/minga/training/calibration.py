"""How far a classifier's probabilities can be taken at their word.

Examples are sorted by the probability that the model gives to its own answer, and cut into bins of
equally many. In each bin the mean probability should be the share of right answers. The expected
calibration error is the mean gap over the bins (Naeini et al., AAAI 2015; Guo et al., ICML 2017);
bins of equal mass instead of equal width keep it from resting on nearly empty bins (Nixon et al.,
CVPR workshops 2019).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.document import Document
from minga.training.errors import ShapeError

NUM_BINS = 15


class Calibration(Document):
    """What the probabilities of one split are worth; 0 is best for all of it."""

    expected_error: float
    """Mean gap between confidence and accuracy over the bins."""
    largest_error: float
    """The widest of these gaps."""
    brier: float
    """Mean squared distance of the probabilities from the truth (Brier 1950), summed over
    classes and halved, so that two classes give the score of the one probability."""


def calibrate(probabilities: NDArray[Any], targets: NDArray[Any]) -> Calibration:
    """Measure the calibration of a classifier.

    Args:
        probabilities: of the positive class, shape `(n,)`, or of each class, shape `(n, classes)`.
        targets: 0 or 1, or the class's index; shape `(n,)`.

    Raises:
        ShapeError: the shapes do not fit, or a probability is none.
    """
    table = as_classes(probabilities)
    labels = np.asarray(targets).reshape(len(targets), -1)
    if labels.shape != (len(table), 1) or len(table) == 0:
        raise ShapeError(
            f"Task.probabilities gave {np.shape(probabilities)} for targets {np.shape(targets)}; "
            "give shape (n,) or (n, classes) for targets of shape (n,)"
        )
    if not np.all((table >= 0) & (table <= 1)):
        raise ShapeError(
            f"Task.probabilities gave values from {table.min():g} to {table.max():g}; "
            "give probabilities, such as sigmoid or softmax of the outputs"
        )
    classes = labels[:, 0].astype(int)
    confidence, answer = table.max(axis=1), table.argmax(axis=1)
    gaps, weights = _gaps(confidence, answer == classes)
    truth = np.eye(table.shape[1])[classes]
    return Calibration(
        expected_error=float(np.average(gaps, weights=weights)),
        largest_error=float(gaps.max()),
        brier=float(np.mean(np.sum((table - truth) ** 2, axis=1)) / 2),
    )


def as_classes(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Give probabilities of every class, shape `(n, classes)`."""
    values = np.asarray(probabilities, np.float64)
    if values.ndim == 2 and values.shape[1] > 1:
        return values
    positive = values.reshape(-1)
    return np.stack([1 - positive, positive], axis=1)


def _gaps(
    confidence: NDArray[np.float64], is_right: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give each bin's gap and its number of examples; equal confidences share a bin."""
    order = np.argsort(confidence, kind="stable")
    confidence, is_right = confidence[order], is_right[order]
    ends = np.linspace(0, len(confidence), min(NUM_BINS, len(confidence)) + 1).astype(int)[1:-1]
    # A border inside of a run of equal confidences would split it by chance.
    starts = np.unique([0, *np.searchsorted(confidence, confidence[ends], side="left")])
    counts = np.diff([*starts, len(confidence)])
    means = np.add.reduceat(confidence, starts) / counts
    shares = np.add.reduceat(is_right.astype(np.float64), starts) / counts
    return np.abs(means - shares), counts.astype(np.float64)
