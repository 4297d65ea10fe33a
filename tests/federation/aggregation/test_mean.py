"""The plain server step."""

import numpy as np
import pytest

from minga.federation.aggregation.mean import apply_mean

MODEL = np.array([1.0, -2.0, 3.0], np.float32)
MEAN = np.array([0.5, 0.5, -1.0], np.float32)


def test_the_model_moves_by_the_mean():
    """With a learning rate of one the mean update is added; the old model is left as it was."""
    before = MODEL.copy()
    moved = apply_mean(MODEL, MEAN)
    assert moved.dtype == np.float32
    assert moved.tolist() == [1.5, -1.5, 2.0]
    np.testing.assert_array_equal(MODEL, before)


@pytest.mark.parametrize(("rate", "first"), [(0.0, 1.0), (0.5, 1.25), (2.0, 2.0)])
def test_the_learning_rate_scales_the_step(rate: float, first: float):
    """The step is the learning rate times the mean update."""
    assert apply_mean(MODEL, MEAN, rate)[0] == first


@pytest.mark.parametrize(
    "mean", [np.zeros(1, np.float32), np.zeros((3, 1), np.float32), np.zeros(4, np.float32)]
)
def test_nothing_is_broadcast(mean: np.ndarray):
    """A mean update of another shape is refused, even where it would broadcast."""
    with pytest.raises(ValueError, match="both must be vectors of one length"):
        apply_mean(MODEL, mean)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_a_step_into_infinity_is_refused(spoilt: float):
    """A model that is not finite never becomes the global model."""
    with pytest.raises(ValueError, match="NaN or infinity"):
        apply_mean(MODEL, np.array([0.0, 0.0, spoilt], np.float32))
