"""The gates' verdicts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.training import Maximize, Minimize
from minga.training.calibration import Calibration
from minga.training.config import GateConfig
from minga.training.gates import Difference, Evidence, Trial, compare, judge

AUC = Maximize("auc")
SOUND = Evidence(
    metrics={"auc": 0.9, "loss": 0.3},
    slices={"night": 0.85},
    parity_error=1e-6,
    latency_ms=1.0,
    size_bytes=1000,
    champion=3,
    difference=Difference(gain=0.01, low=-0.005, high=0.02),
    schema_breaks=(),
)

UNSURE = Calibration(expected_error=0.2, largest_error=0.4, brier=0.2)


def answered(runtime, error):
    """What one runtime made of the model."""
    return (Trial(runtime=runtime, error=error, detail=""),)


def refused(evidence, objective=AUC, **limits):
    """Names of the gates that refuse."""
    return [gate.name for gate in judge(evidence, GateConfig(**limits), objective).refused]


def test_sound_candidate_is_blessed():
    """A candidate that holds every limit is blessed, and its metrics are kept."""
    report = judge(SOUND, GateConfig(floors={"auc": 0.8}), AUC)
    assert report.blessed
    assert report.metrics == {"auc": 0.9, "loss": 0.3}
    assert len(report.gates) == 7


@pytest.mark.parametrize(
    ("change", "limits", "gate"),
    [
        ({}, {"floors": {"auc": 0.95}}, "auc"),
        ({}, {"floors": {"recall": 0.1}}, "recall"),
        ({"difference": Difference(gain=0, low=-0.02, high=0.02)}, {}, "auc against champion"),
        ({"difference": None}, {}, "auc against champion"),
        (
            {"champion": None, "metrics": {"auc": float("nan")}, "slices": {}},
            {},
            "auc against champion",
        ),
        ({"slices": {"night": 0.7}}, {}, "slice night"),
        ({"schema_breaks": ("columns are fewer",)}, {}, "schema"),
        ({"parity_error": 0.1}, {}, "onnx parity"),
        ({"parity_error": float("nan")}, {}, "onnx parity"),
        ({"latency_ms": 51.0}, {}, "latency p95"),
        ({"size_bytes": 2_000_000}, {"max_size_mb": 1.0}, "size"),
        ({"on_bad_days": {"noise of 0.1": (0.7, 0.1)}}, {}, "noise of 0.1"),
        ({"on_bad_days": {"gaps": (float("nan"), 0.1)}}, {}, "gaps"),
        ({"calibration": UNSURE}, {}, "calibration error"),
        ({"trials": answered("device", 0.1)}, {}, "runs in device"),
        ({"trials": answered("serving", None)}, {}, "runs in serving"),
        ({"trials": answered("edge", float("nan"))}, {}, "runs in edge"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_each_gate_refuses_alone(change, limits, gate):
    """One limit that is not held is enough, and it is the one that is named."""
    assert refused(replace(SOUND, **change), **limits) == [gate]


def test_small_slice_is_reported_not_judged():
    """A slice of a few examples tells its figure and that it is too few to refuse for."""
    evidence = replace(SOUND, slices={"night": 0.1}, slice_sizes={"night": 29})
    (gate,) = [gate for gate in judge(evidence, GateConfig(), AUC).gates if "slice" in gate.name]
    assert gate.passed
    assert gate.seen == "auc 0.1000, overall 0.9000; 29 examples are too few to judge"
    assert refused(evidence, min_slice_examples=29) == ["slice night"]


def test_first_version_needs_no_champion():
    """Without a champion there is nothing to be worse than."""
    assert refused(replace(SOUND, champion=None, difference=None)) == []


def test_floor_of_a_minimised_objective_is_a_ceiling():
    """A minimised objective must stay below its floor; slices may be a little worse."""
    evidence = replace(SOUND, slices={"night": 0.5})
    assert refused(evidence, Minimize("loss"), floors={"loss": 0.4}, max_slice_gap=0.3) == []
    assert refused(evidence, Minimize("loss"), floors={"loss": 0.2}, max_slice_gap=0.1) == [
        "loss",
        "slice night",
    ]


def accuracy_of(candidate, champion):
    """Measure two sets of verdicts on the same examples."""
    return lambda rows: (float(candidate[rows].mean()), float(champion[rows].mean()))


@given(st.integers(0, 1000))
def test_a_model_is_not_worse_than_itself(seed):
    """Paired resampling of one model against itself has no spread at all."""
    right = np.random.default_rng(seed).random(200) < 0.9
    found = compare(accuracy_of(right, right), 200, GateConfig(num_resamples=50), AUC, seed=seed)
    assert (found.gain, found.low, found.high) == (0, 0, 0)


def test_interval_holds_the_gain_and_follows_the_direction():
    """A better model has a positive interval, negated where less is better; it repeats."""
    generator = np.random.default_rng(0)
    good, bad = generator.random(2000) < 0.95, generator.random(2000) < 0.85
    config = GateConfig()
    up = compare(accuracy_of(good, bad), 2000, config, AUC, seed=1)
    down = compare(accuracy_of(good, bad), 2000, config, Minimize("error"), seed=1)
    assert 0 < up.low < up.gain < up.high
    assert (down.low, down.high) == pytest.approx((-up.high, -up.low))
    assert up == compare(accuracy_of(good, bad), 2000, config, AUC, seed=1)


def test_small_test_split_cannot_prove_equality():
    """On few examples the interval of two equally good models is wide, so the gate refuses."""
    generator = np.random.default_rng(0)
    one, other = generator.random(30) < 0.8, generator.random(30) < 0.8
    found = compare(accuracy_of(one, other), 30, GateConfig(), AUC, seed=1)
    assert refused(replace(SOUND, difference=found)) == ["auc against champion"]


def test_resamples_without_a_value_do_not_count():
    """A metric that some resamples lack, whatever the model, is compared on the others."""

    def measure(rows):
        return (float("nan"), float("nan")) if rows[0] % 2 else (0.5, 0.4)

    found = compare(measure, 10, GateConfig(), AUC, seed=1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_what_spoils_the_metric_is_not_left_out(lost):
    """A candidate whose loss on one example is infinite, or no number, is worse than any champion.

    Else the resamples without that example, a third of them, would speak for it.
    """
    fine = np.zeros(100)
    spoiled = np.where(np.arange(100) == 7, lost, -1.0)
    loss = Minimize("loss")
    found = compare(accuracy_of(spoiled, fine), 100, GateConfig(), loss, seed=1)
    assert (found.gain, found.low) == (-np.inf, -np.inf)
    assert refused(replace(SOUND, difference=found)) == ["auc against champion"]
    back = compare(accuracy_of(fine, spoiled), 100, GateConfig(), loss, seed=1)
    assert back.gain == np.inf


def test_models_without_any_value_cannot_be_compared():
    """Where neither model has a value on the test split, nothing speaks for the candidate."""
    nothing = np.full(10, float("nan"))
    found = compare(accuracy_of(nothing, nothing), 10, GateConfig(), AUC, seed=1)
    assert refused(replace(SOUND, difference=found)) == ["auc against champion"]
