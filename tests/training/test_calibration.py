"""Calibration and the disturbances of the robustness gates, against cases with a known answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from minga.training.calibration import calibrate
from minga.training.errors import ShapeError
from minga.training.profile import Profile, profile_columns
from minga.training.robustness import gaps, noise
from minga.training.schema import infer_schema
from minga.training.task import Split


def drawn(num_examples, seed=0):
    """Probabilities, and targets that are drawn by them: perfectly calibrated."""
    generator = np.random.default_rng(seed)
    probabilities = generator.random(num_examples)
    return probabilities, (generator.random(num_examples) < probabilities).astype(np.float32)


def test_honest_probabilities_have_no_error():
    """Targets drawn by the probabilities leave only what chance leaves: under 1 % of 200,000."""
    found = calibrate(*drawn(200_000))
    assert found.expected_error < 0.01
    assert found.largest_error < 0.02


def test_boasting_is_measured():
    """Always sure of the positive class, right in three of four: wrong by a quarter."""
    found = calibrate(np.ones(1000), np.arange(1000) % 4 != 0)
    assert (found.expected_error, found.largest_error) == pytest.approx((0.25, 0.25))
    assert found.brier == pytest.approx(0.25)


def test_classes_are_judged_by_the_models_own_answer():
    """With several classes the probability of the answer given is what counts."""
    table = np.tile([0.6, 0.3, 0.1], (1000, 1))
    found = calibrate(table, np.where(np.arange(1000) < 600, 0, 1))
    assert found.expected_error == pytest.approx(0, abs=1e-12)
    shifted = calibrate(table, np.where(np.arange(1000) < 300, 0, 1))
    assert shifted.expected_error == pytest.approx(0.3)


@given(st.integers(0, 1000), st.integers(1, 500))
def test_brier_score_is_that_of_scikit_learn(seed, num_examples):
    """For two classes the score is scikit-learn's, for one example too; the error is a share."""
    probabilities, targets = drawn(num_examples, seed)
    found = calibrate(probabilities, targets)
    expected = brier_score_loss(targets, probabilities, pos_label=1, labels=[0, 1])
    assert found.brier == pytest.approx(expected)
    assert 0 <= found.expected_error <= found.largest_error <= 1


@pytest.mark.parametrize(
    ("probabilities", "targets"),
    [
        (np.zeros(3), np.zeros(4)),
        (np.full(3, 1.5), np.zeros(3)),
        (np.full(3, np.nan), np.zeros(3)),
        (np.full((3, 2), 0.5), np.zeros((3, 2))),
    ],
)
def test_what_are_no_probabilities_is_refused(probabilities, targets):
    """Logits, wrong shapes and values that are no numbers are the Task's mistake, and named."""
    with pytest.raises(ShapeError, match=r"Task\.probabilities"):
        calibrate(probabilities, targets)


@pytest.fixture(scope="module")
def table():
    """Three columns: a number, a category, a number with missing values; schema and profile."""
    generator = np.random.default_rng(0)
    inputs = np.stack(
        [
            generator.normal(50, 10, 5000),
            generator.choice([1, 2, 3], 5000, p=[0.2, 0.7, 0.1]),
            np.where(generator.random(5000) < 0.1, np.nan, generator.normal(size=5000)),
        ],
        axis=1,
    ).astype(np.float32)
    split = Split(inputs=inputs, targets=np.zeros(5000))
    columns = profile_columns(inputs)
    return inputs, infer_schema(split), Profile(num_examples=5000, inputs=columns, targets=())


def test_noise_is_in_units_of_each_column(table):
    """Numbers get noise of their own scale, categories none; the seed decides all of it."""
    inputs, schema, profile = table
    noisy = noise(schema, profile, amount=0.1, seed=1)(inputs)
    change = noisy - inputs
    assert np.std(change[:, 0]) == pytest.approx(1.0, rel=0.05)
    assert not change[:, 1].any()
    assert np.nanstd(change[:, 2]) == pytest.approx(0.1, rel=0.05)
    again = noise(schema, profile, amount=0.1, seed=1)(inputs)
    assert np.array_equal(noisy, again, equal_nan=True)


def test_gaps_are_filled_as_clients_would(table):
    """NaN where training knew it, else the mean, or a category's most frequent value."""
    inputs, schema, profile = table
    holed = gaps(schema, profile, share=0.2, seed=1)(inputs)
    is_gone = ~np.isclose(holed, inputs, equal_nan=True)
    assert is_gone[:, 0].mean() == pytest.approx(0.2, abs=0.02)
    assert holed[is_gone[:, 0], 0] == pytest.approx(profile.inputs[0].mean)
    assert set(holed[is_gone[:, 1], 1]) == {2.0}
    assert np.isnan(holed[is_gone[:, 2], 2]).all()


def test_images_are_disturbed_too():
    """Inputs that are no table are disturbed value by value."""
    inputs = np.random.default_rng(0).random((20, 1, 8, 8)).astype(np.float32)
    split = Split(inputs=inputs, targets=np.zeros(20))
    schema, columns = infer_schema(split), profile_columns(inputs.reshape(-1, 1))
    profile = Profile(num_examples=20, inputs=columns, targets=())
    assert noise(schema, profile, amount=0.1, seed=1)(inputs).shape == inputs.shape
    assert (gaps(schema, profile, share=0.5, seed=1)(inputs) != inputs).mean() > 0.4
