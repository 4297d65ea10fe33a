"""Small Tasks for simulations: three classes, five owners, and networks of several kinds."""

# ruff: noqa: RUF012 - Tasks as researchers write them

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Split, Splits, Task, loguniform


def classes(num_rows, seed):
    """Three overlapping clouds in six columns; every example has an owner."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(3, size=num_rows)
    inputs = generator.normal(size=(num_rows, 6)) + 1.5 * np.eye(3, 6)[targets]
    owners = np.array(["ada", "ben", "cem", "dai", "eva"])[generator.integers(5, size=num_rows)]
    return Split(inputs=inputs, targets=targets, owners=owners)


class Dense(Task):
    """Tell three clouds apart by dense layers."""

    name = "dense"
    defaults = {"lr": 0.1, "batch_size": 8, "optimiser": "SGD", "momentum": 0.0}
    objective = Maximize("accuracy")
    columns = ("a", "b", "c", "d", "e", "f")

    def data(self, source):
        seed = int(source.rpartition("/")[2])
        return Splits(
            train=classes(240, seed), validation=classes(90, seed + 1), test=classes(90, 99)
        )

    def model(self, params):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def optimiser(self, model, params):
        if params["optimiser"] == "SGD":
            return torch.optim.SGD(model.parameters(), params["lr"], params["momentum"])
        return getattr(torch.optim, params["optimiser"])(model.parameters(), lr=params["lr"])

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean(outputs.argmax(axis=1) == targets))}


class Searched(Dense):
    """Searches the rate at which devices learn."""

    search_space = {"lr": loguniform(0.001, 1.0)}


class Gaps(Dense):
    """Misses some of its values."""

    def data(self, source):
        splits = super().data(source)
        splits.train.inputs[::7, 2] = np.nan
        return splits


class Sites(Dense):
    """Reads sources such as `site-3`."""

    def data(self, source):
        return super().data(source.rpartition("-")[2])


class Headed(Dense):
    """Has a head by name, for personal tensors."""

    def model(self, params):
        body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(12, 3)))


class Chain(nn.Sequential):
    """May compute anything, for all that one can see from outside."""


class Disguised(Dense):
    """Is a chain of dense layers, of a kind of its own."""

    def model(self, params):
        return Chain(*super().model(params))


class Convolution(Dense):
    """Is no chain of dense layers."""

    def model(self, params):
        return nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        )


class Weighted(Convolution):
    """Its batch's loss is not the mean of its examples' losses."""

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0, 5.0]))


class Drops(Dense):
    """Draws random numbers while it trains."""

    def model(self, params):
        return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 3))


class Normalises(Dense):
    """Keeps statistics of what it saw."""

    def model(self, params):
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))
