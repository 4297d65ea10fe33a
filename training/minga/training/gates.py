"""What a version must reach before it may become champion.

Every gate leaves what it saw and what it wanted, passed or not; the verdict is stored with the
version. The numbers come from `minga.training.candidate`; here is only the judgement.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minga.training.calibration import Calibration
from minga.training.config import GateConfig
from minga.training.document import Document
from minga.training.fairness import Fairness
from minga.training.space import Objective


class Gate(Document):
    """One condition and its verdict."""

    name: str
    passed: bool
    seen: str
    goal: str


class GateReport(Document):
    """The verdict over all gates: a version is blessed if every one passed."""

    blessed: bool
    metrics: dict[str, float]
    """Of the candidate, on the test split."""
    gates: tuple[Gate, ...]
    champion: int | None = None
    """The version that it was compared with; None if there was none."""
    calibration: Calibration | None = None
    """Of the candidate on the test split, if the Task gives probabilities."""
    fairness: tuple[Fairness, ...] = ()
    """By attribute, if the Task names groups and gives probabilities."""

    @property
    def refused(self) -> tuple[Gate, ...]:
        """The gates that did not pass."""
        return tuple(gate for gate in self.gates if not gate.passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much better the candidate's objective is than the champion's, with its interval.

    All three are negative where the candidate is worse, whatever the objective's direction.
    """

    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How a fresh process of a runtime took the model.

    Attributes:
        runtime: `serving` or `device`.
        error: the largest difference between its answers and the export's; None if it gave none.
        detail: what happened, in words.
    """

    runtime: str
    error: float | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured of a candidate, on the test split where data is involved.

    Attributes:
        metrics: of the candidate.
        slices: slice -> the objective's metric on it.
        parity_error: largest difference between ONNX model and network.
        latency_ms: 95th percentile for one example.
        size_bytes: of the ONNX model.
        champion: version that it is compared with, None if there is none.
        difference: to the champion; None without one, or if it cannot take the same inputs.
        schema_breaks: what the champion's clients would trip over.
        slice_sizes: slice -> its examples.
        on_bad_days: kind of disturbance -> the objective's metric under it, and how much worse it
            may be than without.
        calibration: None if the Task gives no probabilities.
        fairness: by attribute.
        trials: what the runtimes said that are to load this model.
    """

    metrics: Mapping[str, float]
    slices: Mapping[str, float]
    parity_error: float
    latency_ms: float
    size_bytes: int
    champion: int | None
    difference: Difference | None
    schema_breaks: tuple[str, ...]
    slice_sizes: Mapping[str, int] = field(default_factory=dict)
    on_bad_days: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    calibration: Calibration | None = None
    fairness: tuple[Fairness, ...] = ()
    trials: tuple[Trial, ...] = ()


def judge(evidence: Evidence, config: GateConfig, objective: Objective) -> GateReport:
    """Pass the verdict on a candidate."""
    gates = (
        *_floors(evidence, config, objective),
        _regression(evidence, config, objective),
        *_slices(evidence, config, objective),
        *_robustness(evidence, objective),
        *_calibration(evidence, config),
        *_fairness(evidence, config),
        _schema(evidence),
        _budget("onnx parity", evidence.parity_error, config.max_parity_error, ""),
        _budget("latency p95", evidence.latency_ms, config.max_latency_ms, " ms"),
        _budget("size", evidence.size_bytes / 1e6, config.max_size_mb, " MB"),
        *(_trial(trial, config) for trial in evidence.trials),
    )
    return GateReport(
        blessed=all(gate.passed for gate in gates),
        metrics=dict(evidence.metrics),
        gates=gates,
        champion=evidence.champion,
        calibration=evidence.calibration,
        fairness=evidence.fairness,
    )


def compare(
    measure: Callable[[NDArray[np.intp]], tuple[float, float]],
    num_examples: int,
    config: GateConfig,
    objective: Objective,
    *,
    seed: int,
) -> Difference:
    """Compare two models on the same examples by a paired bootstrap.

    Both models are measured on the same resampled examples, so what makes an example hard for
    both cancels (Efron and Tibshirani 1993, chapter 13: percentile interval).

    Args:
        measure: from indices of examples to the objective's metric of candidate and champion.
        num_examples: of the test split.
        config: number of resamples and confidence.
        objective: decides the sign.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    gains = []
    for _ in range(config.num_resamples):
        candidate, champion = measure(generator.integers(num_examples, size=num_examples))
        gains.append(_gain(candidate, champion, objective))
    # A resample without any positive example can have no value, whatever the model.
    known = sorted(gain for gain in gains if not math.isnan(gain))
    gain = _gain(*measure(np.arange(num_examples)), objective)
    if not known or math.isnan(gain):
        return Difference(gain=gain, low=-math.inf, high=math.inf)
    outside = math.floor((1 - config.confidence) / 2 * (len(known) - 1))
    return Difference(gain=gain, low=known[outside], high=known[-1 - outside])


def _gain(candidate: float, champion: float, objective: Objective) -> float:
    """Give how much better a candidate is; not a number if neither has a value.

    A candidate that alone has none, or an infinite loss, is worse without bounds. Were such
    resamples left out, it would be judged by those that hold none of its worst examples.
    """
    if candidate == champion:  # both may be infinite
        return 0.0
    gain = objective.gain(candidate, champion)
    if math.isnan(gain) and not (math.isnan(candidate) and math.isnan(champion)):
        return -math.inf if math.isnan(candidate) else math.inf
    return gain


def _floors(evidence: Evidence, config: GateConfig, objective: Objective) -> tuple[Gate, ...]:
    return tuple(
        _floor(name, evidence.metrics.get(name), goal, objective)
        for name, goal in sorted(config.floors.items())
    )


def _floor(name: str, seen: float | None, goal: float, objective: Objective) -> Gate:
    is_ceiling = name == objective.metric and objective.mode == "min"
    sign = "<=" if is_ceiling else ">="
    reached = seen is not None and (seen <= goal if is_ceiling else seen >= goal)
    return Gate(
        name=name,
        passed=reached,
        seen="not measured" if seen is None else f"{seen:.4f}",
        goal=f"{sign} {goal:g}",
    )


def _regression(evidence: Evidence, config: GateConfig, objective: Objective) -> Gate:
    name = f"{objective.metric} against champion"
    goal = f"interval above -{config.max_regression:g}"
    if math.isnan(evidence.metrics[objective.metric]):  # so it is no better than anything
        return Gate(name=name, passed=False, seen="the metric is no number", goal=goal)
    if evidence.champion is None:
        return Gate(name=name, passed=True, seen="no champion yet", goal=goal)
    if evidence.difference is None:
        seen = f"version {evidence.champion} does not take this data"
        return Gate(name=name, passed=False, seen=seen, goal=goal)
    difference = evidence.difference
    return Gate(
        name=name,
        passed=difference.low >= -config.max_regression,
        seen=f"{difference.gain:+.4f} ({difference.low:+.4f} .. {difference.high:+.4f}) "
        f"to version {evidence.champion}",
        goal=goal,
    )


def _slices(evidence: Evidence, config: GateConfig, objective: Objective) -> Iterator[Gate]:
    whole = evidence.metrics[objective.metric]
    for name, value in sorted(evidence.slices.items()):
        size = evidence.slice_sizes.get(name, config.min_slice_examples)
        seen = f"{objective.metric} {value:.4f}, overall {whole:.4f}"
        is_small = size < config.min_slice_examples
        yield Gate(
            name=f"slice {name}",
            passed=is_small or objective.gain(value, whole) >= -config.max_slice_gap,
            seen=f"{seen}; {size} examples are too few to judge" if is_small else seen,
            goal=f"gap <= {config.max_slice_gap:g}",
        )


def _robustness(evidence: Evidence, objective: Objective) -> Iterator[Gate]:
    whole = evidence.metrics[objective.metric]
    for name, (value, limit) in evidence.on_bad_days.items():
        yield Gate(
            name=name,
            passed=objective.gain(value, whole) >= -limit,
            seen=f"{objective.metric} {value:.4f}, without {whole:.4f}",
            goal=f"loss <= {limit:g}",
        )


def _calibration(evidence: Evidence, config: GateConfig) -> Iterator[Gate]:
    if evidence.calibration is not None:
        seen = evidence.calibration.expected_error
        yield _budget("calibration error", seen, config.max_calibration_error, "")


def _fairness(evidence: Evidence, config: GateConfig) -> Iterator[Gate]:
    for found in evidence.fairness:
        limits = (
            ("selection", found.selection_gap, config.max_selection_gap),
            ("odds", found.odds_gap, config.max_odds_gap),
        )
        for kind, gap, limit in limits:
            if limit is not None:
                yield _budget(f"{kind} gap by {found.attribute}", gap, limit, "")


def _trial(trial: Trial, config: GateConfig) -> Gate:
    return Gate(
        name=f"runs in {trial.runtime}",
        passed=trial.error is not None and trial.error <= config.max_parity_error,
        seen=trial.detail,
        goal=f"a fresh process loads it and answers within {config.max_parity_error:g}",
    )


def _schema(evidence: Evidence) -> Gate:
    return Gate(
        name="schema",
        passed=not evidence.schema_breaks,
        seen="; ".join(evidence.schema_breaks) or "unbroken",
        goal="what the champion takes",
    )


def _budget(name: str, seen: float, limit: float, unit: str) -> Gate:
    return Gate(
        name=name, passed=seen <= limit, seen=f"{seen:.3g}{unit}", goal=f"<= {limit:g}{unit}"
    )
