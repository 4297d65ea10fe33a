"""What windows mean: significant and large, twice in a row; performance without labels."""

import numpy as np
import pytest

from minga.inference.monitor.estimates import estimated, measured
from minga.inference.monitor.judgement import AlarmKind, Finding, Streak, follow, judge
from minga.inference.monitor.reference import Role
from minga.inference.monitor.sketch import Sketch, scores_of
from tests.serving.watched import logits, reference, rows, truths


def window(table: np.ndarray) -> Sketch:
    """Count a window with what the model answers to it."""
    sketch = Sketch(reference())
    sketch.add(table, logits(table))
    return sketch


def moved(table: np.ndarray) -> set[tuple[str, str, str]]:
    """Name what counts in a window."""
    return {
        (finding.kind.value, finding.subject, finding.statistic)
        for finding in judge(window(table)).findings
        if finding.counts
    }


@pytest.mark.parametrize("num_rows", [50, 500, 5000])
def test_of_quiet_windows_a_hundredth_counts(num_rows):
    """Of windows like the training data no more count than the level, whatever their size."""
    windows = [moved(rows(num_rows, 100 + seed)) for seed in range(300)]
    assert sum(map(bool, windows)) <= 8  # of 3 expected at most; 9 or more are 1 in 250


def test_shift_of_one_column_is_told_of_that_column():
    """0.35 deviations in 500 rows are found where they are, in the column and what follows."""
    found = moved(rows(500, 5, shift=0.35))
    assert ("drift", "first", "shift") in found
    assert {subject for kind, subject, _ in found if kind == "drift"} == {"first"}


def test_a_harmless_shift_is_significant_but_too_small():
    """A tenth of a deviation is certain in 10,000 rows, and yet no drift."""
    findings = judge(window(rows(10_000, 6, shift=0.1))).findings
    shift = next(f for f in findings if (f.subject, f.statistic) == ("first", "shift"))
    assert shift.is_significant
    assert not shift.counts


def test_wider_columns_move_the_shape_alone():
    """A column that spreads keeps its middle: PSI tells, the shift does not."""
    table = rows(2000, 7)
    table[:, 1] *= 2
    found = moved(table)
    assert ("drift", "second", "psi") in found
    assert ("drift", "second", "shift") not in found


def test_missing_outside_unknown_and_outlying_values_are_told():
    """Each fault of the data has its own kind of finding, with the column."""
    table = rows(500, 8)
    table[:60, 0] = np.nan
    table[60:120, 1] = 50
    table[120:180, 3] = 7
    found = {(kind, subject) for kind, subject, _ in moved(table)}
    assert {("missing", "first"), ("range", "second"), ("category", "kind")} <= found
    assert ("outliers", "rows") in found


def test_estimate_without_labels_is_the_truth():
    """Where inputs move, the estimate follows the real accuracy, F1 and areas, without labels."""
    table = rows(20_000, 9)
    table[:, :2] *= 0.3  # nearer to the border between yes and no: harder
    scores, _ = scores_of(reference().answers.kind, logits(table))
    cells = np.zeros((len(reference().only(Role.SCORE).shares), 2), int)
    places = np.searchsorted(reference().only(Role.SCORE).edge_array, scores, side="right")
    np.add.at(cells, (places, 1 - truths(table, 10).astype(int)), 1)
    guessed = {one.metric: one for one in estimated(reference(), cells.sum(1))}
    real = {one.metric: one for one in measured(reference(), cells)}
    assert set(guessed) == {"accuracy", "f1", "roc_auc", "average_precision"}
    for metric, one in guessed.items():
        assert one.value == pytest.approx(real[metric].value, abs=0.025)
    assert real["accuracy"].reference - real["accuracy"].value > 0.08
    assert ("estimated-performance", "accuracy", "loss") in moved(table[:1000])


def test_measures_are_sklearns():
    """Accuracy, F1 and areas of counts in bins are scikit-learn's of the binned scores."""
    from sklearn import metrics

    score = reference().only(Role.SCORE)
    table = rows(4000, 11)
    places = np.searchsorted(score.edge_array, logits(table), side="right")
    labels = truths(table, 12).astype(int)
    cells = np.zeros((len(score.shares), 2), int)
    np.add.at(cells, (places, 1 - labels), 1)
    found = {one.metric: one.value for one in measured(reference(), cells)}
    answers = places >= reference().answers.cut
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, answers))
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(labels, places))
    expected = metrics.average_precision_score(labels, places)
    assert found["average_precision"] == pytest.approx(expected)


def finding(value: float, subject: str = "x") -> Finding:
    """Make a finding that counts from 0.2 on."""
    return Finding(
        kind=AlarmKind.DRIFT,
        subject=subject,
        statistic="psi",
        value=value,
        limit=0.2,
        p_value=0.0,
        is_significant=True,
    )


def test_alarms_take_two_windows_in_a_row_each_way():
    """Raised at the second window that counts, cleared at the second that does not; never twice."""
    values = [0.3, 0.1, 0.3, 0.4, 0.5, 0.1, 0.3, 0.1, 0.0, 0.0]
    streaks: dict = {}
    changes = []
    for number, value in enumerate(values):
        streaks, changed = follow(streaks, [finding(value)], since=float(number))
        changes += [(number, one.is_raised, one.since) for _, one in changed]
    assert changes == [(3, True, 2.0), (8, False, 2.0)]
    assert streaks == {}


def test_subjects_have_streaks_of_their_own():
    """Two columns that move in turn raise nothing; the stronger statistic speaks for a column."""
    streaks: dict = {}
    for number in range(6):
        values = (0.3, 0.0) if number % 2 else (0.0, 0.3)
        findings = [finding(values[0], "x"), finding(values[1], "y")]
        streaks, changed = follow(streaks, findings, since=0.0)
        assert not changed
    streaks, _ = follow({}, [finding(0.1), finding(0.9)], since=5.0)
    assert streaks == {("drift", "x"): Streak(is_raised=False, length=1, since=5.0)}
