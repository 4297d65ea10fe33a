"""Who is best and who is chosen, against figures that are known."""

import numpy as np
import pytest
from scipy import stats

from minga.training.errors import TrainingError
from minga.training.selection.comparison import (
    Outcome,
    corrected_error,
    interval,
    p_value,
    select,
)
from minga.training.space import Maximize, Minimize

VALUES = [0.81, 0.84, 0.79, 0.86, 0.83]


def outcomes(values, size=1000, metric="accuracy"):
    """What a contender came to."""
    return [Outcome(metrics={metric: value}, seconds=1.0, size_bytes=size) for value in values]


def choose(trials, objective=None, **options):
    """The choice among contenders: name -> (values, size)."""
    objective = objective or Maximize("accuracy")
    given = {
        name: outcomes(values, size, objective.metric) for name, (values, size) in trials.items()
    }
    federate = dict.fromkeys(trials, True)
    return select(given, [0.25] * 5, objective, confidence=0.95, can_federate=federate, **options)


def test_without_overlap_it_is_the_t_test():
    """With a ratio of 0, as if folds shared nothing, error, interval and p are the textbook's."""
    expected = stats.ttest_1samp(VALUES, 0.8)
    differences = [value - 0.8 for value in VALUES]
    assert corrected_error(VALUES, 0) == pytest.approx(stats.sem(VALUES))
    assert p_value(differences, 0) == pytest.approx(expected.pvalue)
    assert interval(VALUES, 0, 0.95) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_overlap_widens_the_error():
    """Nadeau and Bengio's factor for 5 folds is 1/5 + 1/4 in place of 1/5."""
    wider = corrected_error(VALUES, 0.25) / corrected_error(VALUES, 0)
    assert wider == pytest.approx((0.45 / 0.2) ** 0.5)


def test_plain_test_finds_what_is_not_there():
    """Of two models that are equally good the corrected test rarely prefers one; the plain does.

    Both are lines through two of four columns, which tell equally much. On each data set they are
    compared in 15 random splits, and which does better is chance that these splits share.
    """
    generator = np.random.default_rng(0)
    false = np.zeros(2)
    num_sets = 200
    for _ in range(num_sets):
        columns = generator.normal(size=(60, 4))
        targets = columns.sum(axis=1) * 0.3 + generator.normal(size=60)
        differences = []
        for _ in range(15):
            judge, learn = np.split(generator.permutation(60), [12])
            errors = []
            for part in (columns[:, :2], columns[:, 2:]):
                weights = np.linalg.lstsq(part[learn], targets[learn], rcond=None)[0]
                errors.append(np.mean((targets[judge] - part[judge] @ weights) ** 2))
            differences.append(errors[0] - errors[1])
        false += [p_value(differences, 0) < 0.05, p_value(differences, 0.25) < 0.05]
    plain, corrected = false / num_sets
    assert plain > 0.15
    assert corrected < 0.06


def test_clear_winner_is_chosen():
    """A smaller model that is clearly worse is not chosen, and the table says how much worse."""
    found = choose({"large": (VALUES, 9000), "small": ([v - 0.1 for v in VALUES], 100)})
    assert (found.best, found.chosen) == ("large", "large")
    small = found.of("small")
    assert small.behind == pytest.approx(0.1)
    assert small.p_value < 1e-6
    assert "no smaller model is as good" in found.why


def test_simpler_is_chosen_if_it_is_as_good():
    """Within one standard error of the difference the smallest model is taken."""
    close = (np.array(VALUES) - [0.02, -0.02, 0.01, -0.01, 0.01]).tolist()
    found = choose({"large": (VALUES, 9000), "small": (close, 100), "bad": ([0.1] * 5, 10)})
    assert (found.best, found.chosen) == ("large", "small")
    assert found.of("small").behind <= found.of("small").error
    assert "within one standard error" in found.why
    assert [one.name for one in found.standings] == ["large", "small", "bad"]


def test_less_may_be_better():
    """Where the objective is an error the smaller mean is best."""
    found = choose(
        {"good": ([1.0, 1.1, 0.9, 1.0, 1.2], 50), "bad": ([2.0, 2.2, 1.9, 2.1, 2.3], 50)},
        Minimize("rmse"),
    )
    assert found.best == "good"
    assert found.of("bad").behind == pytest.approx(1.06)


def test_equal_contenders_are_no_difference():
    """The same figures in each fold give a difference of 0 with p = 1, and the smaller model."""
    found = choose({"a": (VALUES, 200), "b": (VALUES, 100)})
    assert found.chosen == "b"
    assert {one.p_value for one in found.standings} == {1.0}


def test_contenders_that_fail_do_not_count():
    """What raised, or has no value in a fold, is listed with its reason; others go on."""
    trials = {
        "good": outcomes(VALUES),
        "raises": [*outcomes(VALUES[:4]), Outcome(error="ValueError: no")],
        "empty": [*outcomes(VALUES[:4]), *outcomes([float("nan")])],
    }
    federate = dict.fromkeys(trials, False)
    ratios = [0.25] * 5
    found = select(trials, ratios, Maximize("accuracy"), confidence=0.9, can_federate=federate)
    assert {one.name: one.reason for one in found.failures} == {
        "raises": "ValueError: no",
        "empty": "accuracy has no value in fold 5",
    }
    del trials["good"]
    with pytest.raises(TrainingError, match="no contender could be judged: raises: ValueError"):
        select(trials, ratios, Maximize("accuracy"), confidence=0.9, can_federate=federate)
