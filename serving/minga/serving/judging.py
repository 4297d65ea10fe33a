"""Decides what becomes of a challenger, by what both versions did.

It knows no clock and no traffic, and remembers nothing but how often it has looked.

A breach of a limit counts when it is large enough to matter *and* too unlikely to be chance:

- failures: the gap of the two rates; Fisher's exact test (1922), one-sided.
- time: the ratio of the 95th percentiles; the same test on the requests that took longer than
  the limit.
- predictions: the population stability index (Siddiqi 2006) over the deciles of the baseline,
  or over classes; under the null it is a multiple of chi-squared (Yurdakul, "Statistical
  Properties of Population Stability Index", 2018). A version that repairs what the baseline does
  wrong may as well answer as it did on its own test data; see `Expectation`.

The challenger is looked at again and again, which would make chance findings sure in the end. So
look k spends alpha / (k (k + 1)) of the chance of a false alarm (Lan and DeMets, Biometrika 1983,
give the idea of spending), shared by the three tests, and a look is taken only when the
challenger has half as many requests again as at the look before.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from minga.inference.monitor.indices import bin_counts, stability_index
from minga.inference.monitor.reference import Column
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


class Expectation(StrEnum):
    """What a canary's predictions are to look like."""

    BASELINE = "baseline"
    """Like those of the version before, which is taken to be right."""
    REPAIR = "repair"
    """Like those, or like its own on its test data, which the monitor will hold it to as well: a
    version that repairs another one answers otherwise than what it repairs."""
    ANY = "any"
    """Nothing is known of them, as where the test data is older than what it learned from."""


Drift = Callable[[Tally, Tally], tuple[float, float] | None]
"""Tells of a baseline and a challenger how far the predictions are from what is expected, and the
chance of so much or more; None if it cannot be told."""


def drift_by(expects: Expectation, tested: Column | None = None) -> Drift:
    """Give what tells how far predictions are from what is expected.

    Args:
        expects: what is.
        tested: how the challenger's were distributed on its test data, if that is known.
    """

    def from_either(baseline: Tally, challenger: Tally) -> tuple[float, float] | None:
        if expects is Expectation.ANY or not challenger.predictions:
            return None
        found = []
        if baseline.predictions:
            found.append(stability(baseline.predictions, challenger.predictions))
        if expects is Expectation.REPAIR and tested is not None:
            found.append(stability_as_tested(tested, challenger.predictions))
        return min(found, default=None)

    return from_either


class CanaryJudge:
    """Judges one stage of a canary.

    Args:
        config: what counts as worse, and how long a stage takes.
        drift: tells how far its predictions are from what is expected.
    """

    def __init__(self, config: ComparisonConfig, drift: Drift | None = None) -> None:
        self._config = config
        self._drift = drift or drift_by(Expectation.BASELINE)
        self._num_looks = 0
        self._next_look = _FIRST_LOOK

    def look(self, baseline: Tally, challenger: Tally, elapsed_s: float) -> Verdict:
        """Decide by what was counted so far in this stage, and how long it has lasted."""
        config = self._config
        measures = measures_of(baseline, challenger, config, self._drift)
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
    baseline: Tally, challenger: Tally, config: ComparisonConfig, drift: Drift
) -> tuple[Measure, ...]:
    """Compare two versions in each respect in which both have been seen."""
    measures = []
    if baseline.requests and challenger.requests:
        measures.append(
            Measure(
                name="failures: gap of the rates",
                value=_rate(challenger) - _rate(baseline),
                limit=config.max_error_gap,
                p=fisher_p(
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
                p=fisher_p(slow, _answered(challenger), usual, _answered(baseline)),
            )
        )
    if (drifted := drift(baseline, challenger)) is not None:
        index, p = drifted
        measures.append(
            Measure(name="predictions: stability index", value=index, limit=config.max_drift, p=p)
        )
    return tuple(measures)


def _rate(tally: Tally) -> float:
    return tally.failures / tally.requests


def _answered(tally: Tally) -> int:
    return sum(tally.times.values())


def fisher_p(hits: int, tries: int, usual_hits: int, usual_tries: int) -> float:
    """Give the chance of so many hits or more, if both kinds of tries hit equally often."""
    all_tries, all_hits = tries + usual_tries, hits + usual_hits
    term = math.exp(
        _log_choose(tries, hits)
        + _log_choose(usual_tries, usual_hits)
        - _log_choose(all_tries, all_hits)
    )
    total = 0.0
    for count in range(hits, min(tries, all_hits) + 1):
        total += term
        if term < total * 1e-12:
            break
        left = usual_tries - all_hits + count + 1
        term *= (tries - count) * (all_hits - count) / ((count + 1) * left) if left else 0.0
    return min(total, 1.0)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def stability(usual: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """Give the population stability index of two samples, and its chance if they are alike."""
    classes = sorted(set(usual) | set(now))
    edges = classes[:-1]
    if len(classes) > _MAX_CLASSES:
        ordered = sorted(usual)
        ranks = (len(ordered) * step // _NUM_BINS for step in range(1, _NUM_BINS))
        edges = sorted({ordered[rank] for rank in ranks})
    expected, observed = (_shares(sample, edges) for sample in (usual, now))
    index = sum((q - p) * math.log(q / p) for p, q in zip(expected, observed, strict=True))
    degrees = len(expected) - 1
    return index, chi_squared_p(index / (1 / len(usual) + 1 / len(now)), degrees)


def stability_as_tested(tested: Column, now: Sequence[float]) -> tuple[float, float]:
    """Give the index of a sample against a profile, and its chance if they are alike."""
    # What is no number is endless in a sample, and must not be taken for missing.
    counts = bin_counts(tested.edge_array, np.nan_to_num(np.asarray(now, np.float64)))
    index = float(stability_index(tested.share_array, counts))
    chance = index / (1 / tested.num_examples + 1 / len(now))
    return index, chi_squared_p(chance, len(tested.shares) - 1)


def _shares(sample: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Give the share of each bin; half a value more in each keeps empty ones above 0."""
    counts = [0.5] * (len(edges) + 1)
    for value in sample:
        counts[bisect_left(edges, value)] += 1
    total = sum(counts)
    return [count / total for count in counts]


def chi_squared_p(value: float, degrees: int) -> float:
    """Give the chance of so much or more, by the cube root (Wilson and Hilferty, PNAS 1931)."""
    if degrees < 1 or value <= 0:
        return 1.0
    width = 2 / (9 * degrees)
    z = ((value / degrees) ** (1 / 3) - (1 - width)) / math.sqrt(width)
    return math.erfc(z / math.sqrt(2)) / 2


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
        p = math.erfc(abs(difference) / error / math.sqrt(2))
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
