"""How good a model's answers are: estimated without labels, and measured once labels have come.

The estimate is CBPE, confidence-based performance estimation (J. Bialek, W. Kuberski, N. Perrakis,
A. Bifet, Estimating Model Performance Under Covariate Shift Without Labels, arXiv:2401.08348,
2024): if a score means the same share of right answers as it did on the test split, the scores
alone tell how many answers are right. Here it works on counts: each bin of the score has its share
of yes (or of right answers) on the test split, fitted to rise with the score.

Errors of a model that answers numbers are estimated by `minga.inference.monitor.losses` instead.

It sees what changed in the inputs. It cannot see a change in what the right answer to an input is
(concept drift): only labels tell that.

Measures of yes and no are made of two counts per bin of the score, how many are a yes and how many
a no; whether these are expected or seen makes no difference to the arithmetic.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.inference.monitor.indices import Counts, Floats
from minga.inference.monitor.reference import AnswerKind, Answers, Reference, Role
from minga.inference.monitor.significance import LossNull, upper_normal, usual_size

ERROR: Final = "mean_absolute_error"
NUM_DRAWS: Final = 2000
_TINY: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """A measure of the model, beside what it was on the test split.

    Attributes:
        metric: accuracy, f1, roc_auc or average_precision (more is better), or
            mean_absolute_error (less is better).
        value: now.
        reference: on the test split, in the same bins.
        p_value: the probability of so much loss by luck, if nothing has changed.
    """

    metric: str
    value: float
    reference: float
    p_value: float

    @property
    def loss(self) -> float:
        """How much worse it is; negative if it is better."""
        return self.value - self.reference if self.is_error else self.reference - self.value

    @property
    def is_error(self) -> bool:
        """Whether less is better."""
        return self.metric == ERROR


def estimated(reference: Reference, scores: Counts) -> tuple[Performance, ...]:
    """Estimate measures from the scores of a window, without labels.

    Args:
        reference: of the model; gives nothing unless it tells the rates of scores, or losses.
        scores: how many scores fell into each bin, at least one.
    """
    answers, score = reference.answers, reference.only(Role.SCORE)
    if score is not None and reference.losses is not None and scores.sum():
        value, usual, deviation = reference.losses.expected(scores, score.share_array)
        p_value = upper_normal((value - usual) / max(deviation, _TINY))
        return (Performance(metric=ERROR, value=value, reference=usual, p_value=p_value),)
    if answers is None or score is None or not answers.rates or not scores.sum():
        return ()
    cells = _expected(answers, scores)
    law = _expected(answers, score.share_array)
    null = _null(reference, usual_size(int(scores.sum())), with_labels=False)
    return _compared(answers, cells, law, null)


def measured(reference: Reference, cells: Counts) -> tuple[Performance, ...]:
    """Measure from labels.

    Args:
        reference: of the model; gives nothing unless it tells the rates of scores.
        cells: how many examples fell into each bin of the score: the ones that are a yes (or
            whose answer was right) and the others, shape `(bins, 2)`.
    """
    answers, score = reference.answers, reference.only(Role.SCORE)
    if answers is None or score is None or not answers.rates or not cells.sum():
        return ()
    law = _expected(answers, score.share_array)
    null = _null(reference, usual_size(int(cells.sum())), with_labels=True)
    return _compared(answers, cells.astype(np.float64), law, null)


def measured_error(reference: Reference, errors: Floats) -> tuple[Performance, ...]:
    """Measure a model that answers numbers, from absolute errors of shape `(n,)`."""
    answers = reference.answers
    if answers is None or answers.kind is not AnswerKind.NUMBER or not len(errors):
        return ()
    value = float(errors.mean())
    spread = math.sqrt(1 / len(errors) + 1 / max(reference.num_held_out, 1))
    deviation = max(answers.error_deviation * spread, _TINY)
    p_value = upper_normal((value - answers.error) / deviation)
    return (Performance(metric=ERROR, value=value, reference=answers.error, p_value=p_value),)


def _compared(
    answers: Answers, cells: Floats, law: Floats, null: Mapping[str, LossNull]
) -> tuple[Performance, ...]:
    now, then = _measures(answers, cells), _measures(answers, law)
    return tuple(
        Performance(
            metric=name,
            value=float(now[name]),
            reference=float(then[name]),
            p_value=null[name].tail(float(then[name] - now[name])),
        )
        for name in now
        if name in null and math.isfinite(now[name]) and math.isfinite(then[name])
    )


def _expected(answers: Answers, scores: Floats | Counts) -> Floats:
    """Part counts by bins, shape `(..., bins)`, into yes and no, shape `(..., bins, 2)`."""
    rates = np.asarray(answers.rates)
    return np.stack([scores * rates, scores * (1 - rates)], axis=-1)


def _measures(answers: Answers, cells: NDArray[np.float64]) -> dict[str, Floats]:
    """Compute measures from yes and no by bins, shape `(..., bins, 2)`; NaN where undefined."""
    yes, no = cells[..., 0], cells[..., 1]
    total = yes.sum(-1) + no.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if answers.kind is AnswerKind.CLASS:
            return {"accuracy": yes.sum(-1) / total}
        hits, false_alarms = yes[..., answers.cut :].sum(-1), no[..., answers.cut :].sum(-1)
        misses = yes[..., : answers.cut].sum(-1)
        right = hits + no[..., : answers.cut].sum(-1)
        return {
            "accuracy": right / total,
            "f1": 2 * hits / (2 * hits + false_alarms + misses),
            "roc_auc": _area(yes, no),
            "average_precision": _average_precision(yes, no),
        }


def _area(yes: Floats, no: Floats) -> Floats:
    """Give the probability that a yes scores above a no, ties shared out."""
    below = np.cumsum(no, axis=-1) - no / 2
    area: Floats = (yes * below).sum(-1) / (yes.sum(-1) * no.sum(-1))
    return area


def _average_precision(yes: Floats, no: Floats) -> Floats:
    """Give the mean precision over the yes, each bin being one threshold."""
    hits = np.cumsum(yes[..., ::-1], axis=-1)
    chosen = hits + np.cumsum(no[..., ::-1], axis=-1)
    precision = hits / np.where(chosen > 0, chosen, 1)
    mean: Floats = (yes[..., ::-1] * precision).sum(-1) / yes.sum(-1)
    return mean


@lru_cache(maxsize=1024)
def _null(reference: Reference, num_rows: int, *, with_labels: bool) -> dict[str, LossNull]:
    """Draw how much each measure is lost by luck, of windows of a size and of test splits."""
    windows = _draw(reference, num_rows, with_labels=with_labels, seed=1)
    tests = _draw(reference, reference.num_held_out, with_labels=True, seed=2)
    losses = {name: tests[name] - windows[name] for name in windows}
    return {
        name: LossNull.of(loss[np.isfinite(loss)])
        for name, loss in losses.items()
        if np.isfinite(loss).any()
    }


def _draw(
    reference: Reference, num_rows: int, *, with_labels: bool, seed: int
) -> dict[str, Floats]:
    answers, score = reference.answers, reference.only(Role.SCORE)
    assert answers is not None, "its callers have looked"
    assert score is not None, "its callers have looked"
    generator = np.random.default_rng(seed)
    law = score.share_array / score.share_array.sum()
    if with_labels:
        cells = _expected(answers, law)
        flat = generator.multinomial(num_rows, cells.reshape(-1), NUM_DRAWS)
        drawn = flat.reshape(NUM_DRAWS, *cells.shape).astype(np.float64)
    else:
        drawn = _expected(answers, generator.multinomial(num_rows, law, NUM_DRAWS))
    return _measures(answers, drawn)
