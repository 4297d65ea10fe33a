"""Decides what becomes of a challenger, by what both versions did.

It knows no clock and no traffic, and remembers nothing but how often it has looked.

A breach of a limit counts when it is large enough to matter *and* too unlikely to be chance:

- failures: the gap of the two rates; Fisher's exact test (1922), one-sided.
- time: the ratio of the 95th percentiles; the same test on the requests that took longer than
  the limit.
- predictions: the population stability index (Siddiqi 2006) over the deciles of the baseline,
  or over classes; under the null it is a multiple of chi-squared (Yurdakul, "Statistical
  Properties of Population Stability Index", 2018).

The challenger is looked at again and again, which would make chance findings sure in the end. So
look k spends alpha / (k (k + 1)) of the chance of a false alarm (Lan and DeMets, Biometrika 1983,
give the idea of spending), shared by the three tests, and a look is taken only when the
challenger has half as many requests again as at the look before.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from minga.inference.monitor.indices import bin_counts, stability_index
from minga.inference.monitor.significance import more_often, two_sided, upper_gamma
from minga.inference.tally import Tally, slower_than
from minga.serving.config import ComparisonConfig

_FIRST_LOOK: Final = 25
_GROWTH: Final = 1.5
_NUM_TESTS: Final = 3
_SLOW_SHARE: Final = 0.95
_LEAST_GAP_S: Final = 0.002  # a smaller one is the machine's noise, whatever the ratio
_MAX_CLASSES: Final = 20
_NUM_BINS: Final = 10


class Decision(StrEnum):
    """What is to become of a stage."""

    HOLD = "hold"
    ADVANCE = "advance"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A decision, and why."""

    decision: Decision
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How a challenger compares in one respect.

    Attributes:
        name: in which.
        value: by how much it is worse.
        limit: by how much it may be.
        p: how likely so much or more is, if the versions are equal.
    """

    name: str
    value: float
    limit: float
    p: float

    @property
    def is_over(self) -> bool:
        """Whether it is worse than it may be, be it by chance."""
        return self.value > self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g}, limit {self.limit:.3g}, p = {self.p:.2g}"


class CanaryJudge:
    """Judges one stage of a canary.

    Args:
        config: what counts as worse, and how long a stage takes.
    """

    def __init__(self, config: ComparisonConfig) -> None:
        self._config = config
        self._num_looks = 0
        self._next_look = _FIRST_LOOK

    def look(self, baseline: Tally, challenger: Tally, elapsed_s: float) -> Verdict:
        """Decide by what was counted so far in this stage, and how long it has lasted."""
        config = self._config
        measures = measures_of(baseline, challenger, config)
        if challenger.requests >= self._next_look:
            self._num_looks += 1
            self._next_look = math.ceil(challenger.requests * _GROWTH)
            alpha = config.alpha / (_NUM_TESTS * self._num_looks * (self._num_looks + 1))
            for measure in measures:
                if measure.is_over and measure.p < alpha:
                    return Verdict(decision=Decision.ROLL_BACK, reason=str(measure))
        seen = min(challenger.requests, baseline.requests)
        if seen < config.min_requests:
            return _hold(f"{seen} of {config.min_requests} requests")
        if elapsed_s < config.hold_s:
            return _hold(f"{elapsed_s:.0f} of {config.hold_s:.0f} s")
        doubts = [str(measure) for measure in measures if measure.is_over]
        if not doubts:
            return Verdict(decision=Decision.ADVANCE, reason="all within the limits")
        if elapsed_s < config.patience_s:
            return _hold(f"in doubt: {doubts[0]}")
        return Verdict(
            decision=Decision.ROLL_BACK,
            reason=f"in doubt for {elapsed_s:.0f} s: {doubts[0]}",
        )


def _hold(reason: str) -> Verdict:
    return Verdict(decision=Decision.HOLD, reason=reason)


def measures_of(
    baseline: Tally, challenger: Tally, config: ComparisonConfig
) -> tuple[Measure, ...]:
    """Compare two versions in each respect in which both have been seen."""
    measures = []
    if baseline.requests and challenger.requests:
        measures.append(
            Measure(
                name="failures: gap of the rates",
                value=_rate(challenger) - _rate(baseline),
                limit=config.max_error_gap,
                p=more_often(
                    challenger.failures, challenger.requests, baseline.failures, baseline.requests
                ),
            )
        )
    usual_s = baseline.quantile_s(_SLOW_SHARE)
    if usual_s and challenger.times:
        limit_s = max(usual_s * config.max_latency_ratio, usual_s + _LEAST_GAP_S)
        slow, usual = (slower_than(tally.times, limit_s) for tally in (challenger, baseline))
        measures.append(
            Measure(
                name="time: ratio of the 95th percentiles",
                value=challenger.quantile_s(_SLOW_SHARE) / usual_s,
                limit=limit_s / usual_s,
                p=more_often(slow, _answered(challenger), usual, _answered(baseline)),
            )
        )
    if baseline.predictions and challenger.predictions:
        drift, p = stability(baseline.predictions, challenger.predictions)
        measures.append(
            Measure(name="predictions: stability index", value=drift, limit=config.max_drift, p=p)
        )
    return tuple(measures)


def _rate(tally: Tally) -> float:
    return tally.failures / tally.requests


def _answered(tally: Tally) -> int:
    return sum(tally.times.values())


def stability(usual: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """Give the population stability index of two samples, and its chance if they are alike."""
    classes = np.unique([*usual, *now])
    edges = (classes[1:] + classes[:-1]) / 2
    if len(classes) > _MAX_CLASSES:
        edges = np.unique(np.quantile(usual, np.arange(1, _NUM_BINS) / _NUM_BINS))
    expected, observed = (bin_counts(edges, np.asarray(sample)) for sample in (usual, now))
    # Half a value more in each bin, as where an empty one is compared.
    shares = (expected + 0.5) / (expected + 0.5).sum()
    index = float(stability_index(shares, observed))
    degrees = len(edges)
    if not degrees:
        return index, 1.0
    spread = 1 / len(usual) + 1 / len(now)
    return index, upper_gamma(degrees / 2, index / spread / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """How outcomes differ between two versions.

    Attributes:
        difference: the challenger's mean less the baseline's.
        low: the lower end of the 95 % interval.
        high: its upper end.
        p: how likely so much or more is, either way, if the versions are equal.
    """

    difference: float
    low: float
    high: float
    p: float


def effect_of(baseline: Tally, challenger: Tally) -> Effect:
    """Compare the means of outcomes (Welch 1947); with hundreds of them t is normal."""
    ours, theirs = challenger.outcomes, baseline.outcomes
    difference = ours.mean - theirs.mean
    error = math.sqrt(ours.variance / max(ours.count, 1) + theirs.variance / max(theirs.count, 1))
    p = float(difference == 0)  # where nothing varies, any difference is one
    if error:
        p = two_sided(difference / error)
    reach = NormalDist().inv_cdf(0.975) * error
    return Effect(difference=difference, low=difference - reach, high=difference + reach, p=p)


class SplitJudge:
    """Judges an A/B split once: when both versions have the outcomes that were planned.

    Looking before and stopping at the first good moment would find differences where there are
    none, so nothing is said before, and what was said stays.

    Args:
        config: how many outcomes are planned, and how unlikely chance must be.
    """

    def __init__(self, config: ComparisonConfig) -> None:
        self._config = config

    def look(self, baseline: Tally, challenger: Tally) -> Verdict:
        """Say which version is better, once there is enough to say it by."""
        planned = self._config.min_outcomes
        seen = min(baseline.outcomes.count, challenger.outcomes.count)
        if seen < planned:
            return _hold(f"{seen} of {planned} outcomes for each version")
        effect = effect_of(baseline, challenger)
        found = (
            f"{effect.difference:+.4g} [{effect.low:.4g}, {effect.high:.4g}], p = {effect.p:.2g}"
        )
        if effect.p >= self._config.alpha:
            finding = "no difference"
        else:
            finding = "the challenger is " + ("better" if effect.difference > 0 else "worse")
        return Verdict(decision=Decision.ADVANCE, reason=f"{finding}: {found}")


def figures_of(tallies: Iterable[tuple[str, Tally]]) -> dict[str, Any]:
    """Write what was counted for people and JSON."""
    return {
        role: {
            "requests": tally.requests,
            "failures": tally.failures,
            "p50_ms": round(1000 * tally.quantile_s(0.5), 3),
            "p95_ms": round(1000 * tally.quantile_s(_SLOW_SHARE), 3),
        }
        | (
            {
                "compared": tally.pairs,
                "agreements": tally.agreements,
                "mean_gap": round(tally.gap.mean, 6),
            }
            if tally.pairs
            else {}
        )
        | (
            {"outcomes": tally.outcomes.count, "mean_outcome": round(tally.outcomes.mean, 6)}
            if tally.outcomes.count
            else {}
        )
        for role, tally in tallies
    }
