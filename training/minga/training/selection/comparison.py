"""Who is best, by how much, and how sure that is: figures of cross-validation, and the choice.

Folds share training examples, so their figures are not independent, and a plain t-test finds
differences that are none. The variance is corrected for that: `(1 / folds + ratio) * variance`,
with the ratio of examples judged by to examples learned from (Nadeau and Bengio, "Inference for the
generalization error", Machine Learning 2003). All are compared fold by fold with the best.

What is chosen is not the best but the simplest that is as good: the smallest exported model whose
mean falls short of the best's by at most one standard error of their difference (after the
one-standard-error rule of Breiman et al., "Classification and regression trees", 1984, on paired
differences, so that folds that are hard for all count for nothing).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from minga.training.document import Document
from minga.training.errors import TrainingError
from minga.training.space import Objective


class Standing(Document):
    """How a contender did."""

    name: str
    values: tuple[float, ...]
    """The objective's metric in each fold."""
    mean: float
    low: float
    """Of the mean's confidence interval."""
    high: float
    behind: float
    """How much worse than the best, in the mean over folds; 0 for the best itself."""
    behind_low: float
    """Of that difference's confidence interval."""
    behind_high: float
    error: float
    """Standard error of that difference."""
    p_value: float
    """Of the difference under the corrected t-test, two-sided; not corrected for the number of
    contenders. 1 for the best itself."""
    metrics: dict[str, float]
    """Means of all of the Task's metrics."""
    size_bytes: int
    """Of the exported model."""
    seconds: float
    """To fit, in the mean over folds."""
    can_federate: bool
    """Whether it has weights that devices can train further."""


class Failure(Document):
    """A contender that does not count, and why."""

    name: str
    reason: str


class Selection(Document):
    """What the comparison came to."""

    metric: str
    mode: str
    num_folds: int
    confidence: float
    standings: tuple[Standing, ...]
    """The best first."""
    failures: tuple[Failure, ...] = ()
    best: str
    chosen: str
    why: str
    """Of the choice, in words."""

    def of(self, name: str) -> Standing:
        """Give one contender's standing."""
        return next(one for one in self.standings if one.name == name)


class Outcome(Document):
    """What a contender came to in one fold."""

    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    size_bytes: int = 0
    error: str = ""
    """Why there is no figure; empty if there is one."""


def select(
    outcomes: Mapping[str, Sequence[Outcome]],
    ratios: Sequence[float],
    objective: Objective,
    *,
    confidence: float,
    can_federate: Mapping[str, bool],
) -> Selection:
    """Rank contenders and choose one.

    Args:
        outcomes: contender -> what it came to in each fold, in the order of the folds.
        ratios: of each fold, examples judged by for each learned from.
        objective: what is better.
        confidence: of the intervals.
        can_federate: contender -> whether it is a network.

    Raises:
        TrainingError: every contender failed.
    """
    metric, ratio = objective.metric, float(np.mean(ratios))
    failures = {name: _failure(found, metric) for name, found in outcomes.items()}
    sound = {name: found for name, found in outcomes.items() if not failures[name]}
    refused = tuple(Failure(name=n, reason=reason) for n, reason in failures.items() if reason)
    if not sound:
        words = "; ".join(f"{one.name}: {one.reason}" for one in refused)
        raise TrainingError(f"no contender could be judged: {words}")
    values = {n: np.array([t.metrics[metric] for t in found]) for n, found in sound.items()}
    order = sorted(values, key=lambda n: -objective.gain(float(values[n].mean()), 0.0))
    best = order[0]
    standings = tuple(
        _standing(
            name,
            sound[name],
            values[name],
            # In gains, so that a difference above 0 is one by which the best is better.
            np.array(
                [objective.gain(b, v) for b, v in zip(values[best], values[name], strict=True)]
            ),
            ratio=ratio,
            confidence=confidence,
            can_federate=can_federate[name],
        )
        for name in order
    )
    chosen, why = _choose(standings)
    return Selection(
        metric=metric,
        mode=objective.mode,
        num_folds=len(ratios),
        confidence=confidence,
        standings=standings,
        failures=refused,
        best=best,
        chosen=chosen,
        why=why,
    )


def corrected_error(values: Sequence[float], ratio: float) -> float:
    """Give the standard error of the mean over folds that share training examples.

    Args:
        values: one for each fold.
        ratio: examples judged by for each learned from.
    """
    if len(values) < 2:
        return math.inf
    return math.sqrt((1 / len(values) + ratio) * float(np.var(values, ddof=1)))


def interval(values: Sequence[float], ratio: float, confidence: float) -> tuple[float, float]:
    """Give the confidence interval of the mean over folds, by the corrected error."""
    from scipy.stats import t

    mean, error = float(np.mean(values)), corrected_error(values, ratio)
    reach = float(t.ppf((1 + confidence) / 2, max(len(values) - 1, 1))) * error
    return mean - reach, mean + reach


def p_value(differences: Sequence[float], ratio: float) -> float:
    """Give the two-sided p-value of differences, one for each fold, by the corrected t-test."""
    from scipy.stats import t

    mean, error = float(np.mean(differences)), corrected_error(differences, ratio)
    if mean == 0:
        return 1.0
    if error == 0:
        return 0.0
    return float(2 * t.sf(abs(mean) / error, len(differences) - 1))


def _standing(
    name: str,
    outcomes: Sequence[Outcome],
    values: NDArray[np.float64],
    differences: NDArray[np.float64],
    *,
    ratio: float,
    confidence: float,
    can_federate: bool,
) -> Standing:
    low, high = interval(values.tolist(), ratio, confidence)
    behind_low, behind_high = interval(differences.tolist(), ratio, confidence)
    return Standing(
        name=name,
        values=tuple(values.tolist()),
        mean=float(values.mean()),
        low=low,
        high=high,
        behind=float(differences.mean()),
        behind_low=behind_low,
        behind_high=behind_high,
        error=corrected_error(differences.tolist(), ratio),
        p_value=p_value(differences.tolist(), ratio),
        metrics={m: float(np.mean([t.metrics[m] for t in outcomes])) for m in outcomes[0].metrics},
        size_bytes=max(outcome.size_bytes for outcome in outcomes),
        seconds=round(float(np.mean([outcome.seconds for outcome in outcomes])), 3),
        can_federate=can_federate,
    )


def _choose(standings: Sequence[Standing]) -> tuple[str, str]:
    best = standings[0]
    as_good = [one for one in standings if one.behind <= one.error]
    chosen = min(as_good, key=lambda one: (one.size_bytes, one.behind))
    if chosen is best:
        return best.name, "it is the best, and no smaller model is as good"
    return chosen.name, (
        f"it is {chosen.behind:.4f} behind {best.name}, within one standard error "
        f"({chosen.error:.4f}), and its model is the smallest of those: "
        f"{chosen.size_bytes / 1e3:.0f} kB, not {best.size_bytes / 1e3:.0f} kB"
    )


def _failure(outcomes: Sequence[Outcome], metric: str) -> str:
    """Say why a contender's figures do not count; empty if they do."""
    for number, outcome in enumerate(outcomes, start=1):
        if outcome.error:
            return outcome.error
        if not math.isfinite(outcome.metrics.get(metric, math.nan)):
            return f"{metric} has no value in fold {number}"
    return ""
