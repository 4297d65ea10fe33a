"""A small federated learning problem with known data: sites, a network, local training.

Everything is drawn from seeds, so runs that differ in how updates travel see the same devices with
the same batches in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

WRITERS: Final = "digits of 539 writers"
SMALL: Final = "digits of scikit-learn"
_TRAIN: Final = ("mnist_train_0.npz", "mnist_train_1.npz", "mnist_train_2.npz")
_TEST: Final = "mnist_test.npz"


@dataclass(frozen=True, slots=True)
class Site:
    """One device's examples."""

    inputs: Vector
    """Shape `(n, num_inputs)`, 0 to 1."""
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sites that learn one model, and what it is judged by."""

    name: str
    sites: tuple[Site, ...]
    test: Site
    num_hidden: int
    cohort: int
    """Devices in a round."""
    learning_rate: float
    batch_size: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Weights and biases of the two layers."""
        num_inputs, num_classes = self.test.inputs.shape[1], 10
        hidden = self.num_hidden
        return (num_inputs, hidden), (hidden,), (hidden, num_classes), (num_classes,)

    @property
    def num_values(self) -> int:
        """Values of the model."""
        return sum(int(np.prod(shape)) for shape in self.shapes)


def writers(folder: Path) -> Problem:
    """Give MNIST's digits, each writer's on a device of its own.

    Raises:
        FileNotFoundError: the folder does not have them.
    """
    parts = [np.load(folder / name) for name in _TRAIN]
    images, labels, writer = (
        np.concatenate([part[name] for part in parts]) for name in ("images", "labels", "writer")
    )
    whose = [np.flatnonzero(writer == one) for one in np.unique(writer)]
    test = np.load(folder / _TEST)
    return Problem(
        name=WRITERS,
        sites=tuple(_site(images[rows], labels[rows], 255) for rows in whose),
        test=_site(test["images"], test["labels"], 255),
        num_hidden=64,
        cohort=20,
        learning_rate=0.1,
        batch_size=20,
    )


def small_digits(num_sites: int = 40) -> Problem:
    """Give the digits that scikit-learn brings (1,797 of 8 x 8), split among devices by class.

    Half of a device's examples come in the order of their labels, half at random, so that devices
    differ.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    test, train = order[:400], order[400:]
    by_class = train[: len(train) // 2][np.argsort(digits.target[train[: len(train) // 2]])]
    pieces = zip(
        np.array_split(by_class, num_sites),
        np.array_split(train[len(train) // 2 :], num_sites),
        strict=True,
    )
    rows = [np.concatenate(pair) for pair in pieces]
    return Problem(
        name=SMALL,
        sites=tuple(_site(digits.images[some], digits.target[some], 16) for some in rows),
        test=_site(digits.images[test], digits.target[test], 16),
        num_hidden=32,
        cohort=10,
        learning_rate=0.1,
        batch_size=5,
    )


def _site(images: NDArray[np.generic], labels: NDArray[np.generic], largest: int) -> Site:
    flat = images.reshape(len(images), -1).astype(np.float32) / np.float32(largest)
    return Site(flat, labels.astype(np.int64))


def first_model(problem: Problem, seed: int) -> Vector:
    """Draw weights (He et al., ICCV 2015); biases are zero."""
    rng = np.random.default_rng((seed, 0))
    parts = [
        rng.standard_normal(shape) * np.sqrt(2 / shape[0]) if len(shape) == 2 else np.zeros(shape)
        for shape in problem.shapes
    ]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def draw_cohort(problem: Problem, seed: int, number: int) -> list[int]:
    """Draw the devices of a round."""
    rng = np.random.default_rng((seed, 1, number))
    return sorted(rng.choice(len(problem.sites), problem.cohort, replace=False).tolist())


def train(problem: Problem, model: Vector, site: int, seed: int, number: int) -> Vector:
    """Train for one epoch on a device; gives the update."""
    weights = model.copy()
    first, first_bias, second, second_bias = _layers(problem, weights)
    data = problem.sites[site]
    for rows in _batches(problem, len(data.labels), (seed, 2, number, site)):
        inputs, labels = data.inputs[rows], data.labels[rows]
        hidden = np.maximum(inputs @ first + first_bias, 0)
        slope = _softmax(hidden @ second + second_bias)
        slope[np.arange(len(labels)), labels] -= 1
        slope *= np.float32(problem.learning_rate / len(labels))
        hidden_slope = (slope @ second.T) * (hidden > 0)
        second -= hidden.T @ slope
        second_bias -= slope.sum(axis=0)
        first -= inputs.T @ hidden_slope
        first_bias -= hidden_slope.sum(axis=0)
    return weights - model


def accuracy(problem: Problem, model: Vector) -> float:
    """Give the share of the test's digits that the model names rightly."""
    first, first_bias, second, second_bias = _layers(problem, model)
    hidden = np.maximum(problem.test.inputs @ first + first_bias, 0)
    named = (hidden @ second + second_bias).argmax(axis=1)
    return float((named == problem.test.labels).mean())


def _layers(problem: Problem, vector: Vector) -> list[Vector]:
    """Cut a vector into the layers' weights and biases, which share its memory."""
    layers, start = [], 0
    for shape in problem.shapes:
        size = int(np.prod(shape))
        layers.append(vector[start : start + size].reshape(shape))
        start += size
    return layers


def _batches(problem: Problem, count: int, seed: tuple[int, ...]) -> Iterator[NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(count)
    for low in range(0, count, problem.batch_size):
        yield order[low : low + problem.batch_size]


def _softmax(scores: Vector) -> Vector:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: Vector = powers / powers.sum(axis=1, keepdims=True)
    return shares
