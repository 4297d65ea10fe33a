"""Server optimisers: the published steps, and what holds for any of them."""

import tracemalloc
from math import sqrt
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    advance,
    initial_state,
    step,
)
from minga.federation.errors import StepError
from minga.federation.memory import BLOCK_VALUES

OPTIMIZERS = [
    FedAvg(learning_rate=0.7),
    FedAvgM(learning_rate=0.7, momentum=0.9),
    FedAdagrad(learning_rate=0.1, beta_1=0.5, tau=1e-3),
    FedAdam(learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
    FedYogi(learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3),
]
ALL = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)

numbers = st.floats(-100.0, 100.0, width=32)
vectors = st.integers(1, 20).flatmap(lambda n: arrays(np.float32, (4, n), elements=numbers))
"""A model, and three mean updates."""


def vector(*values: float) -> np.ndarray:
    """Give a float32 vector."""
    return np.array(values, np.float32)


def run(
    optimizer: ServerOptimizer, values: np.ndarray, *deltas: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Take one step for each mean update, from the first state on."""
    state = initial_state(optimizer, len(values))
    for delta in deltas:
        state, values = step(optimizer, state, values, delta)
    return state, values


# --- the published steps, by hand: one coordinate from 10, mean updates 2 and -1 ---


@pytest.mark.parametrize(
    ("optimizer", "path", "state"),
    [
        (FedAvg(learning_rate=1.0), [12.0, 11.0], {}),
        (FedAvg(learning_rate=0.5), [11.0, 10.5], {}),
        # m = 2, then 0.5 * 2 - 1 = 0
        (FedAvgM(learning_rate=1.0, momentum=0.5), [12.0, 12.0], {"momentum": 0.0}),
        # v = 1 + 4 = 5, then 6; m = 0.75 * 2 = 1.5, then 0.25 * 1.5 - 0.75 = -0.375
        (
            FedAdagrad(learning_rate=0.5, beta_1=0.25, tau=1.0),
            [
                10 + 0.5 * 1.5 / (sqrt(5) + 1),
                10 + 0.5 * 1.5 / (sqrt(5) + 1) - 0.5 * 0.375 / (sqrt(6) + 1),
            ],
            {"momentum": -0.375, "variance": 6.0},
        ),
        # v = 0.75 * 1 + 0.25 * 4 = 1.75, then 0.75 * 1.75 + 0.25 = 1.5625 = 1.25 ** 2
        (
            FedAdam(learning_rate=0.5, beta_1=0.25, beta_2=0.75, tau=1.0),
            [
                10 + 0.5 * 1.5 / (sqrt(1.75) + 1),
                10 + 0.5 * 1.5 / (sqrt(1.75) + 1) - 0.5 * 0.375 / 2.25,
            ],
            {"momentum": -0.375, "variance": 1.5625},
        ),
        # v = 1 + 0.25 * 4 = 2, for 1 < 4; then 2 - 0.25 * 1 = 1.75, for 2 > 1
        (
            FedYogi(learning_rate=0.5, beta_1=0.25, beta_2=0.75, tau=1.0),
            [
                10 + 0.5 * 1.5 / (sqrt(2) + 1),
                10 + 0.5 * 1.5 / (sqrt(2) + 1) - 0.5 * 0.375 / (sqrt(1.75) + 1),
            ],
            {"momentum": -0.375, "variance": 1.75},
        ),
    ],
    ids=["FedAvg", "FedAvg at a half", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"],
)
def test_published_steps(
    optimizer: ServerOptimizer, path: list[float], state: dict[str, float]
) -> None:
    """Two steps worked out by hand, and the state after them."""
    first = run(optimizer, vector(10.0), vector(2.0))[1]
    kept, second = run(optimizer, vector(10.0), vector(2.0), vector(-1.0))
    np.testing.assert_allclose([first[0], second[0]], path, rtol=1e-6)
    assert {name: float(value[0]) for name, value in kept.items()} == state


def test_variance_starts_at_tau_squared() -> None:
    """Algorithm 2 asks for a first variance of at least tau squared."""
    state = initial_state(OPTIMIZERS[3], 2)
    np.testing.assert_array_equal(state["variance"], np.float32(1e-6))
    np.testing.assert_array_equal(state["momentum"], 0.0)


def test_yogi_forgets_a_large_update_slowly() -> None:
    """After one large update Yogi's variance falls by what is new alone, Adam's by its share."""
    updates = [vector(10.0), *[vector(0.1)] * 5]
    settings = {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.9, "tau": 1e-3}
    adam = run(FedAdam(**settings), vector(0.0), *updates)[0]["variance"]
    yogi = run(FedYogi(**settings), vector(0.0), *updates)[0]["variance"]
    assert adam < 0.6 * 10.0
    assert yogi > 0.99 * 10.0


# --- what holds for any of them ---


@ALL
@given(rows=vectors)
def test_nothing_new_changes_nothing(optimizer: ServerOptimizer, rows: np.ndarray) -> None:
    """A mean update of zero leaves the model as it is, bit by bit, while there is no momentum."""
    state, moved = run(optimizer, rows[0], np.zeros_like(rows[0]))
    np.testing.assert_array_equal(moved, rows[0])
    np.testing.assert_array_equal(state.get("momentum", 0.0), 0.0)


@ALL
@given(rows=vectors, random=st.randoms(use_true_random=False))
def test_order_of_coordinates_does_not_matter(
    optimizer: ServerOptimizer, rows: np.ndarray, random: Random
) -> None:
    """Steps of shuffled vectors are the shuffled steps."""
    order = list(range(rows.shape[1]))
    random.shuffle(order)
    state, moved = run(optimizer, *rows)
    shuffled_state, shuffled = run(optimizer, *rows[:, order])
    np.testing.assert_array_equal(shuffled, moved[order])
    for name, kept in state.items():
        np.testing.assert_array_equal(shuffled_state[name], kept[order])


@ALL
@given(rows=vectors)
def test_steps_stay_finite(optimizer: ServerOptimizer, rows: np.ndarray) -> None:
    """Bounded updates lead to finite models, and a variance is never negative."""
    state, moved = run(optimizer, *rows)
    assert moved.dtype == np.float32
    assert np.isfinite(moved).all()
    assert all(kept.dtype == np.float32 for kept in state.values())
    assert (state.get("variance", vector(0.0)) >= 0).all()


@given(rows=vectors)
def test_full_step_of_fedavg_is_the_sum(rows: np.ndarray) -> None:
    """With a learning rate of 1 the mean update is added, rounded once; so does no momentum."""
    plain = run(FedAvg(learning_rate=1.0), rows[0], rows[1])[1]
    np.testing.assert_array_equal(plain, rows[0] + rows[1])
    heavy = run(FedAvgM(learning_rate=1.0, momentum=0.0), rows[0], rows[1])[1]
    np.testing.assert_array_equal(heavy, plain)


@ALL
def test_inputs_are_left_as_they_were(optimizer: ServerOptimizer) -> None:
    """A step changes neither model, nor state, nor mean update."""
    values, delta = vector(1.0, 2.0), vector(0.5, -0.5)
    state = initial_state(optimizer, 2)
    step(optimizer, state, values, delta)
    np.testing.assert_array_equal(values, [1.0, 2.0])
    np.testing.assert_array_equal(delta, [0.5, -0.5])
    for name, kept in initial_state(optimizer, 2).items():
        np.testing.assert_array_equal(state[name], kept)


@ALL
def test_model_may_be_moved_in_pieces(optimizer: ServerOptimizer) -> None:
    """Pieces of any size give the bits of the whole, also over several blocks."""
    shape = (3, 2 * BLOCK_VALUES + 77)
    values, *deltas = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    whole_state, whole = run(optimizer, values, *deltas)
    state = initial_state(optimizer, len(values))
    for delta in deltas:
        moved = delta.copy()
        for part in (slice(0, 1000), slice(1000, 100_000), slice(100_000, None)):
            kept = {name: vector[part] for name, vector in state.items()}
            advance(optimizer, kept, values[part], moved[part])
        values = moved
    np.testing.assert_array_equal(values, whole)
    for name, vector in whole_state.items():
        np.testing.assert_array_equal(state[name], vector)


@ALL
def test_step_in_place_takes_no_further_model(optimizer: ServerOptimizer) -> None:
    """Advancing needs much less memory than one more vector of the model's length."""
    values = np.zeros(1 << 22, np.float32)
    state, delta = initial_state(optimizer, len(values)), np.ones_like(values)
    tracemalloc.start()
    advance(optimizer, state, values, delta)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < values.nbytes / 2


# --- what is refused ---


@pytest.mark.parametrize(
    "mean", [np.zeros(1, np.float32), np.zeros((3, 1), np.float32), np.zeros(4, np.float32)]
)
def test_nothing_is_broadcast(mean: np.ndarray) -> None:
    """A mean update of another shape is refused, even where it would broadcast."""
    with pytest.raises(StepError, match="both must be vectors of one length"):
        step(FedAvg(learning_rate=1.0), {}, vector(1.0, 2.0, 3.0), mean)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "the state has nothing, FedAvgM keeps"),
        ({"variance": vector(0.0, 0.0)}, r"has \['variance'\], FedAvgM keeps \['momentum'\]"),
        ({"momentum": vector(0.0)}, r"momentum has shape \(1,\), the model \(2,\)"),
    ],
)
def test_foreign_state_is_refused(state: dict[str, np.ndarray], words: str) -> None:
    """The state of another optimiser or another model is refused."""
    optimizer = FedAvgM(learning_rate=1.0, momentum=0.9)
    with pytest.raises(StepError, match=words):
        step(optimizer, state, vector(1.0, 2.0), vector(0.0, 0.0))


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@ALL
def test_step_into_infinity_is_refused(optimizer: ServerOptimizer, spoilt: float) -> None:
    """A model that is not finite never becomes the global model."""
    with pytest.raises(StepError, match=r"NaN or infinity; lower the learning rate"):
        run(optimizer, vector(1.0, 2.0), vector(0.0, spoilt))


def test_overflow_of_the_state_is_refused() -> None:
    """A variance beyond float32 is refused, though the model itself would stand still."""
    with pytest.raises(StepError, match="NaN or infinity"):
        run(OPTIMIZERS[2], vector(1.0), vector(1e30))


@pytest.mark.parametrize("rate", [0.0, -1.0, np.inf, np.nan])
def test_impossible_learning_rate(rate: float) -> None:
    """A learning rate is above zero and finite."""
    for make in (
        lambda: FedAvg(learning_rate=rate),
        lambda: FedAvgM(learning_rate=rate, momentum=0.9),
        lambda: FedAdam(learning_rate=rate, beta_1=0.9, beta_2=0.99, tau=1e-3),
    ):
        with pytest.raises(ValueError, match=r"learning_rate is .*; it must be above 0"):
            make()


@pytest.mark.parametrize("share", [1.0, -0.1, np.nan])
@pytest.mark.parametrize("name", ["beta_1", "beta_2"])
@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_impossible_share(kind: type[ServerOptimizer], name: str, share: float) -> None:
    """What stays each round is a share below one."""
    settings = {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3, name: share}
    with pytest.raises(ValueError, match=f"{name} is .*; it must be from 0 to below 1"):
        kind(**settings)


def test_other_impossible_numbers() -> None:
    """Tau is above zero, and momentum a share."""
    with pytest.raises(ValueError, match="tau is 0; it must be above 0"):
        FedAdagrad(learning_rate=0.1, beta_1=0.0, tau=0.0)
    with pytest.raises(ValueError, match="momentum is 1; it must be from 0 to below 1"):
        FedAvgM(learning_rate=1.0, momentum=1.0)
