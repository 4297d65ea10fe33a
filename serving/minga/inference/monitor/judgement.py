"""What a full window means: findings, and the alarms that come of them.

A finding is one statistic of one column. It counts only if it is significant, all findings of a
window together being held to a false discovery rate of `LEVEL`, *and* large:

- drift of an input or an output: `psi`, the shape, from 0.2, or `shift`, the middle, from 0.2
  standard deviations;
- missing values, unknown categories, outliers, values outside of the training data: `share`, how
  much more than in the reference, from 0.05;
- performance: `loss` against the test split, from 0.05, or a tenth of a mean absolute error.

Significance alone cries wolf in large windows, where a harmless tenth of a standard deviation is
certain; size alone does in small ones, where luck is large. 0.2 deviations are what J. Cohen calls
a small effect (Statistical Power Analysis for the Behavioral Sciences, 1988). PSI alone would not
do: the shift of a normal distribution by 0.3 deviations is a PSI of 0.09.

An alarm is raised when the same thing counts in `PATIENCE` windows in a row, once, and cleared
when it has not counted in as many.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from minga.inference.monitor.estimates import Performance, estimated
from minga.inference.monitor.indices import (
    Counts,
    mean_ridit,
    ridit_variance,
    shift_of,
    stability_index,
)
from minga.inference.monitor.reference import Column, Role
from minga.inference.monitor.significance import (
    discoveries,
    more_often,
    stability_null,
    two_sided,
)
from minga.inference.monitor.sketch import Sketch

LEVEL: Final = 0.01
MIN_STABILITY: Final = 0.2
MIN_SHIFT: Final = 0.2
MIN_SHARE: Final = 0.05
MIN_LOSS: Final = 0.05
MIN_ERROR_GROWTH: Final = 0.1
PATIENCE: Final = 2


class AlarmKind(StrEnum):
    """What an alarm is about."""

    DRIFT = "drift"
    """The distribution of an input has changed."""
    PREDICTION_DRIFT = "prediction-drift"
    """The distribution of what the model answers has changed."""
    MISSING = "missing"
    """More values of an input are missing."""
    RANGE = "range"
    """More values of an input are outside of what the training data has."""
    CATEGORY = "category"
    """Values of an input are none of its categories."""
    OUTLIERS = "outliers"
    """More rows are far from the training data as a whole."""
    ESTIMATED_PERFORMANCE = "estimated-performance"
    """The model is worse, by an estimate that needs no labels."""
    PERFORMANCE = "performance"
    """The model is worse, by labels that came later."""
    CONCEPT_DRIFT = "concept-drift"
    """The stream of errors has changed, by labels that came later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One statistic of a window.

    Attributes:
        kind: what an alarm would be about.
        subject: the column, or the measure.
        statistic: psi, shift, share or loss.
        value: of the statistic.
        limit: from which on it is large.
        p_value: the probability of so much by luck.
        is_significant: among all findings of the window.
    """

    kind: AlarmKind
    subject: str
    statistic: str
    value: float
    limit: float
    p_value: float
    is_significant: bool = False

    @property
    def counts(self) -> bool:
        """Whether it is significant and large."""
        return self.is_significant and abs(self.value) >= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a window came to.

    Attributes:
        findings: all of them, also those that do not count.
        outlier_share: of its rows; 0 if the reference cannot tell.
        estimates: of the model's performance, without labels.
    """

    findings: tuple[Finding, ...]
    outlier_share: float
    estimates: tuple[Performance, ...]


def judge(sketch: Sketch) -> Judgement:
    """Compare a window of at least one row with its reference."""
    found: list[Finding] = []
    for place, column in enumerate(sketch.reference.columns):
        counts = sketch.counts[place]
        if column.role is not Role.SCORE and counts.sum():
            found += _drift(column, counts)
        if column.role is Role.INPUT:
            found += _quality(column, sketch, place)
    found += _outliers(sketch)
    scores = sketch.of_column(Role.SCORE)
    estimates = estimated(sketch.reference, scores) if scores is not None else ()
    found += [loss_of(AlarmKind.ESTIMATED_PERFORMANCE, performance) for performance in estimates]
    return Judgement(
        findings=with_significance(found),
        outlier_share=sketch.outliers / sketch.rows if sketch.rows else 0.0,
        estimates=estimates,
    )


def with_significance(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Say which findings are significant among all of them."""
    findings = tuple(found)
    chosen = discoveries(np.array([finding.p_value for finding in findings]), LEVEL)
    return tuple(
        Finding(
            kind=finding.kind,
            subject=finding.subject,
            statistic=finding.statistic,
            value=finding.value,
            limit=finding.limit,
            p_value=finding.p_value,
            is_significant=bool(is_significant),
        )
        for finding, is_significant in zip(findings, chosen, strict=True)
    )


def loss_of(kind: AlarmKind, performance: Performance) -> Finding:
    """Hold a measure against what it was on the test split."""
    is_error = performance.is_error
    return Finding(
        kind=kind,
        subject=performance.metric,
        statistic="loss",
        value=max(performance.loss, 0.0),
        limit=MIN_ERROR_GROWTH * performance.reference if is_error else MIN_LOSS,
        p_value=performance.p_value if performance.loss > 0 else 1.0,
    )


def _drift(column: Column, counts: Counts) -> Iterable[Finding]:
    """Compare the shape of a column, and where it is a number, its middle."""
    kind = AlarmKind.DRIFT if column.role is Role.INPUT else AlarmKind.PREDICTION_DRIFT
    num_values = int(counts.sum())
    index = float(stability_index(column.share_array, counts))
    null = stability_null(column.shares, column.num_examples, num_values)
    yield Finding(
        kind=kind,
        subject=column.name,
        statistic="psi",
        value=index,
        limit=MIN_STABILITY,
        p_value=null.tail(index),
    )
    variance = ridit_variance(column.share_array)
    if column.categories or variance == 0:
        return
    ridit = mean_ridit(column.share_array, counts)
    spread = math.sqrt(variance * (1 / num_values + 1 / column.num_examples))
    yield Finding(
        kind=kind,
        subject=column.name,
        statistic="shift",
        value=shift_of(ridit),
        limit=MIN_SHIFT,
        p_value=two_sided((ridit - 0.5) / spread),
    )


def _quality(column: Column, sketch: Sketch, place: int) -> Iterable[Finding]:
    """Compare how many values of an input are none, or none that training has seen."""
    num_present = int(sketch.counts[place].sum())
    num_missing = int(sketch.missing[place])
    num_values = num_present + num_missing
    usual = round(column.missing * column.num_examples)
    yield _more(AlarmKind.MISSING, column, num_missing, num_values, usual)
    if column.categories:
        num_unknown = int(sketch.unknown[place])
        yield _more(AlarmKind.CATEGORY, column, num_unknown, num_present, 0)
    else:
        # The training data's own extremes are what two of its values reach.
        num_outside = int(sketch.outside[place])
        yield _more(AlarmKind.RANGE, column, num_outside, num_present, 2)


def _more(kind: AlarmKind, column: Column, count: int, num_values: int, usual: int) -> Finding:
    num_reference = max(column.num_examples, usual)
    excess = count / num_values - usual / num_reference if num_values else 0.0
    return Finding(
        kind=kind,
        subject=column.name,
        statistic="share",
        value=max(excess, 0.0),
        limit=MIN_SHARE,
        p_value=more_often(count, num_values, usual, num_reference) if num_values else 1.0,
    )


def _outliers(sketch: Sketch) -> Iterable[Finding]:
    outliers, num_held_out = sketch.reference.outliers, sketch.reference.num_held_out
    if outliers is None or not sketch.rows:
        return
    usual = math.ceil(outliers.share * num_held_out)
    yield Finding(
        kind=AlarmKind.OUTLIERS,
        subject="rows",
        statistic="share",
        value=max(sketch.outliers / sketch.rows - outliers.share, 0.0),
        limit=MIN_SHARE,
        p_value=more_often(sketch.outliers, sketch.rows, usual, num_held_out),
    )


@dataclass(frozen=True, slots=True)
class Streak:
    """How long something has counted, or has not.

    Attributes:
        is_raised: whether an alarm stands.
        length: how many of the newest windows in a row speak for the other state.
        since: when the first of the windows began that speak for the state as it is, or as it
            becomes; in seconds since 1970.
    """

    is_raised: bool = False
    length: int = 0
    since: float = 0.0


Key = tuple[str, str]
"""Kind and subject of what may be alarming."""


def follow(
    streaks: Mapping[Key, Streak], findings: Iterable[Finding], *, since: float
) -> tuple[dict[Key, Streak], tuple[tuple[Finding, Streak], ...]]:
    """Take a window's findings into account.

    Args:
        streaks: of the windows before; is not changed.
        findings: of the new window.
        since: when the new window began.

    Returns:
        The streaks after the window, and what has changed with it: the finding that tells most of
        the subject, and the new streak, whose `is_raised` says which way.
    """
    after = dict(streaks)
    changes: list[tuple[Finding, Streak]] = []
    for key, finding in _strongest(findings).items():
        streak = streaks.get(key, Streak())
        if finding.counts is streak.is_raised:
            after[key] = Streak(streak.is_raised, 0, streak.since)
        else:
            length = streak.length + 1
            # A standing alarm keeps its beginning until it is cleared.
            begun = since if length == 1 and not streak.is_raised else streak.since
            after[key] = Streak(streak.is_raised, length, begun)
            if length >= PATIENCE:
                after[key] = Streak(not streak.is_raised, 0, begun)
                changes.append((finding, after[key]))
        if after[key] == Streak(since=after[key].since):
            del after[key]
    return after, tuple(changes)


def _strongest(findings: Iterable[Finding]) -> dict[Key, Finding]:
    """Choose of each subject the finding that counts, else the largest beside its limit."""
    chosen: dict[Key, Finding] = {}
    for finding in findings:
        key = (finding.kind.value, finding.subject)
        best = chosen.get(key)
        if best is None or _rank(finding) > _rank(best):
            chosen[key] = finding
    return chosen


def _rank(finding: Finding) -> tuple[bool, float]:
    return finding.counts, abs(finding.value) / max(finding.limit, 1e-12)
