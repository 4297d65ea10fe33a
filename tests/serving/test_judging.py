"""Judging a challenger by counts alone: equal versions pass, worse ones do not, chance is borne."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.inference.monitor.reference import Column, Role
from minga.inference.tally import Moments, Tally, compare, prediction_of
from minga.serving.config import ComparisonConfig
from minga.serving.judging import (
    CanaryJudge,
    Decision,
    Expectation,
    SplitJudge,
    chi_squared_p,
    drift_by,
    effect_of,
    fisher_p,
    stability,
    stability_as_tested,
)


def config(**changes) -> ComparisonConfig:
    """Stages of 200 requests that need no time."""
    return ComparisonConfig.model_validate({"hold_s": 0.0, "min_requests": 200} | changes)


class Version:
    """A version in simulated traffic.

    Args:
        failures: the share of its requests that fail.
        slow: by how much its times are longer.
        shift: by how much its predictions are larger.
    """

    def __init__(self, seed: int, *, failures=0.0, slow=1.0, shift=0.0):
        self.tally = Tally()
        self._random = random.Random(seed)
        self._failures, self._slow, self._shift = failures, slow, shift

    def answer(self) -> None:
        if self._random.random() < self._failures:
            self.tally.failed()
            return
        seconds = self._random.lognormvariate(-5, 0.5) * self._slow
        value = np.array([[self._random.gauss(self._shift, 1)]], np.float32)
        self.tally.answered(seconds, [value])


def judged(baseline: Version, challenger: Version, settings, *, share=0.3, limit=6000, drift=None):
    """Let both answer until the stage is decided; look after every 20 requests."""
    judge, chance = CanaryJudge(settings, drift), random.Random(0)
    for number in range(limit):
        (challenger if chance.random() < share else baseline).answer()
        if number % 20 == 0:
            verdict = judge.look(baseline.tally, challenger.tally, elapsed_s=number / 10)
            if verdict.decision is not Decision.HOLD:
                return verdict
    return verdict


def test_equal_versions_pass_nearly_always():
    """Of 60 canaries that are no worse, however often looked at, at most 2 are rolled back."""
    verdicts = [
        judged(Version(seed, failures=0.01), Version(1000 + seed, failures=0.01), config())
        for seed in range(60)
    ]
    rolled_back = [each.reason for each in verdicts if each.decision is Decision.ROLL_BACK]
    assert len(rolled_back) <= 2, rolled_back
    assert sum(each.decision is Decision.ADVANCE for each in verdicts) >= 54


@pytest.mark.parametrize(
    ("fault", "name"),
    [({"failures": 0.2}, "failures"), ({"slow": 3.0}, "time"), ({"shift": 1.5}, "predictions")],
    ids=["fails", "slow", "drifts"],
)
def test_worse_versions_are_rolled_back(fault, name):
    """Of 20 canaries with a plain fault every one is rolled back, for that reason."""
    for seed in range(20):
        verdict = judged(Version(seed), Version(1000 + seed, **fault), config())
        assert verdict.decision is Decision.ROLL_BACK
        assert verdict.reason.startswith(name)


def as_tested(middle: float) -> Column:
    """Give the profile of normal predictions around a middle, from 2000 examples."""
    values = np.random.default_rng(7).normal(middle, 1, 2000)
    edges = np.quantile(values, np.linspace(0.1, 0.9, 9))
    return Column(
        role=Role.OUTPUT,
        name="output",
        edges=tuple(edges),
        shares=(0.1,) * 10,
        num_examples=len(values),
    )


@pytest.mark.parametrize(
    ("expects", "shift", "decision"),
    [
        (Expectation.BASELINE, 2.0, Decision.ROLL_BACK),
        (Expectation.REPAIR, 2.0, Decision.ADVANCE),
        (Expectation.REPAIR, 0.0, Decision.ADVANCE),
        (Expectation.REPAIR, 4.0, Decision.ROLL_BACK),
        (Expectation.REPAIR, np.inf, Decision.ROLL_BACK),
        (Expectation.ANY, 4.0, Decision.ADVANCE),
    ],
)
def test_a_repair_may_answer_as_when_it_was_tested(expects, shift, decision):
    """It was tested around 2: neither that nor the baseline's 0 condemns it, all else does."""
    for seed in range(10):
        drift = drift_by(expects, as_tested(2.0))
        verdict = judged(Version(seed), Version(1000 + seed, shift=shift), config(), drift=drift)
        assert verdict.decision is decision, verdict.reason
    drift = drift_by(expects, as_tested(2.0))
    worse = Version(1, failures=0.3, shift=shift)
    assert judged(Version(2), worse, config(), drift=drift).decision is Decision.ROLL_BACK


def test_a_repair_without_a_profile_is_compared_with_what_it_repairs():
    """A file that does not tell how it was tested leaves the version before as the only measure."""
    drift = drift_by(Expectation.REPAIR)
    verdict = judged(Version(1), Version(2, shift=2.0), config(), drift=drift)
    assert verdict.decision is Decision.ROLL_BACK
    assert verdict.reason.startswith("predictions")


def test_predictions_as_tested_are_seldom_called_others():
    """The chance of a sample of the profile itself is as large as is said, or larger."""
    rng = np.random.default_rng(3)
    samples = rng.normal(size=(300, 300)).tolist()
    chances = [stability_as_tested(as_tested(0.0), sample)[1] for sample in samples]
    assert np.mean(np.array(chances) < 0.05) < 0.15


def test_a_version_that_always_fails_ends_at_the_first_look():
    """25 failures beside a baseline without any are enough."""
    baseline, challenger = Version(1), Version(2, failures=1.0)
    for _ in range(100):
        baseline.answer()
    for _ in range(25):
        challenger.answer()
    verdict = CanaryJudge(config()).look(baseline.tally, challenger.tally, 0.0)
    assert verdict.decision is Decision.ROLL_BACK


def test_harmless_differences_do_not_matter():
    """What is surely there but within the limits lets a stage pass."""
    baseline, challenger = Version(1), Version(2, failures=0.005, slow=1.1, shift=0.1)
    verdict = judged(baseline, challenger, config(min_requests=2000), share=0.5, limit=10000)
    assert verdict.decision is Decision.ADVANCE


def test_doubt_is_held_and_ends():
    """What looks worse but may be chance is neither passed nor condemned, until patience ends."""
    baseline, challenger = Tally(requests=200, failures=0), Tally(requests=200, failures=4)
    judge = CanaryJudge(config(patience_s=100.0))
    held = judge.look(baseline, challenger, 50.0)
    assert (held.decision, held.reason[:8]) == (Decision.HOLD, "in doubt")
    assert judge.look(baseline, challenger, 100.0).decision is Decision.ROLL_BACK


def test_a_stage_needs_requests_and_time():
    """Neither a rush of requests nor an idle hour ends a stage."""
    few, many = Tally(requests=199), Tally(requests=5000)
    settings = config(hold_s=60.0)
    assert CanaryJudge(settings).look(many, few, 1e6).decision is Decision.HOLD
    assert CanaryJudge(settings).look(few, many, 1e6).decision is Decision.HOLD
    assert CanaryJudge(settings).look(many, many, 59.0).decision is Decision.HOLD
    assert CanaryJudge(settings).look(many, many, 60.0).decision is Decision.ADVANCE


@given(
    baseline=st.tuples(st.integers(0, 3000), st.floats(0, 1)),
    challenger=st.tuples(st.integers(0, 3000), st.floats(0, 1)),
    elapsed_s=st.floats(0, 1e6),
)
def test_no_counts_break_the_judge(baseline, challenger, elapsed_s):
    """Whatever was counted there is a verdict, and none against a version that fails less."""
    tallies = [
        Tally(requests=requests, failures=int(share * requests))
        for requests, share in (baseline, challenger)
    ]
    verdict = CanaryJudge(config()).look(*tallies, elapsed_s)
    usual, new = tallies
    if verdict.decision is Decision.ROLL_BACK:
        assert new.failures * usual.requests > usual.failures * new.requests


@settings(max_examples=30)
@given(tries=st.integers(1, 60), usual_tries=st.integers(1, 60), data=st.data())
def test_fisher_agrees_with_scipy(tries, usual_tries, data):
    """The exact test is the library's."""
    stats = pytest.importorskip("scipy.stats")
    hits = data.draw(st.integers(0, tries))
    usual_hits = data.draw(st.integers(0, usual_tries))
    table = [[hits, tries - hits], [usual_hits, usual_tries - usual_hits]]
    expected = stats.fisher_exact(table, alternative="greater").pvalue
    assert fisher_p(hits, tries, usual_hits, usual_tries) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("degrees", [1, 4, 9, 19])
@pytest.mark.parametrize("p", [0.5, 0.05, 1e-3, 1e-5])
def test_chi_squared_is_near_scipys(degrees, p):
    """The approximation hardly understates a chance, and overstates the least ones threefold."""
    stats = pytest.importorskip("scipy.stats")
    assert 0.6 * p < chi_squared_p(stats.chi2.isf(p, degrees), degrees) < 3 * p


def test_stability_knows_shifts_from_chance():
    """Samples of one distribution are alike, numbers and classes; shifted ones are not."""
    rng = np.random.default_rng(1)
    numbers, classes = rng.normal(size=(2, 1000)), rng.integers(0, 3, (2, 1000)).astype(float)
    for usual, now in (numbers, classes):
        index, p = stability(list(usual), list(now))
        assert index < 0.1
        assert p > 1e-3
    index, p = stability(list(numbers[0]), list(numbers[1] + 1))
    assert index > 0.5
    assert p < 1e-9
    assert stability([1.0] * 100, [1.0] * 100) == (0.0, 1.0)
    assert stability([1.0] * 100, [2.0] * 100)[1] < 1e-9


def test_a_split_is_judged_once_there_is_enough():
    """Nothing is said before the planned outcomes; then which version is better, or neither."""
    judge, rng = SplitJudge(config(min_outcomes=400)), np.random.default_rng(2)
    usual, better, same = Tally(), Tally(), Tally()
    for _ in range(400):
        usual.outcomes.add(float(rng.random() < 0.3))
        better.outcomes.add(float(rng.random() < 0.5))
        same.outcomes.add(float(rng.random() < 0.3))
    assert judge.look(usual, better).reason.startswith("the challenger is better")
    assert judge.look(better, usual).reason.startswith("the challenger is worse")
    assert judge.look(usual, same).reason.startswith("no difference")
    better.outcomes.count -= 1
    assert judge.look(usual, better).decision is Decision.HOLD


def test_the_effect_agrees_with_scipys():
    """Welch's test, with the normal in place of t at these numbers."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    values = rng.normal(0, 1, 500), rng.normal(0.1, 2, 700)
    tallies = [Tally(), Tally()]
    for tally, some in zip(tallies, values, strict=True):
        for value in some:
            tally.outcomes.add(float(value))
    expected = stats.ttest_ind(values[1], values[0], equal_var=False)
    effect = effect_of(*tallies)
    assert effect.difference == pytest.approx(values[1].mean() - values[0].mean())
    assert effect.p == pytest.approx(expected.pvalue, rel=0.02)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=20), max_size=5))
def test_moments_add_up(parts):
    """Mean and variance of the parts' sums are those of the whole."""
    total = Moments()
    for part in parts:
        moments = Moments()
        for value in part:
            moments.add(value)
        total.merge(moments)
    values = [value for part in parts for value in part]
    assert total.count == len(values)
    if len(values) > 1:
        assert total.mean == pytest.approx(np.mean(values), abs=1e-6)
        assert total.variance == pytest.approx(np.var(values, ddof=1), rel=1e-6, abs=1e-4)


def test_replicas_add_up():
    """Counts are sums, quantiles are right within the buckets, and samples keep their shares."""
    tallies = []
    for seed, shift in enumerate((0, 0, 10)):
        version = Version(seed, shift=shift, failures=0.1)
        for _ in range(3000):
            version.answer()
        tallies.append(version.tally)
    total = Tally.sum(tallies)
    assert total.requests == 9000
    assert total.failures == sum(tally.failures for tally in tallies)
    assert total.num_predictions == 9000 - total.failures
    assert sum(value > 5 for value in total.predictions) == pytest.approx(334, abs=10)
    assert total.quantile_s(0.5) == pytest.approx(np.exp(-5), rel=0.1)
    assert Tally.sum([]) == Tally()


@pytest.mark.parametrize(
    ("output", "value"),
    [
        (np.array([[0.1, 0.7, 0.2]], np.float32), 1.0),
        (np.array([[4.5], [1.0]]), 4.5),
        (np.array([3, 9]), 3.0),
        (np.array([True]), 1.0),
        (np.array([np.nan]), np.inf),
        (np.empty((0, 3), np.float32), None),
        (None, None),
    ],
)
def test_a_prediction_is_a_number(output, value):
    """A class is its place, a number itself; what is none is infinite; nothing is nothing."""
    assert prediction_of(output) == value


def test_texts_are_told_apart():
    """Equal texts are equal numbers, and different ones are not."""
    texts = [np.array([text], object) for text in ("cat", b"cat", "dog")]
    cat, same, dog = map(prediction_of, texts)
    assert cat == same != dog


@pytest.mark.parametrize(
    ("left", "right", "agrees"),
    [
        ([[0.1, 0.9]], [[0.4, 0.6]], True),
        ([[0.1, 0.9]], [[0.6, 0.4]], False),
        ([[1.0]], [[1.005]], True),
        ([[1.0]], [[1.1]], False),
        ([[np.nan]], [[np.nan]], True),
        ([[1.0]], [[1.0], [1.0]], False),
    ],
)
def test_answers_agree_by_what_they_mean(left, right, agrees):
    """Classes agree by their place, numbers within a percent, shapes not at all."""
    tally = Tally()
    compare({"output": np.array(left)}, {"output": np.array(right)}, tally)
    assert (tally.pairs, tally.agreements) == (1, int(agrees))
