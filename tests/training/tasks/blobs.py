"""Small Tasks for tests: two clouds of points, and what can be wrong with a Task."""

# ruff: noqa: RUF012 - Tasks as researchers write them

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minga.training import Maximize, Split, Splits, Task, choice, loguniform


def cloud(num_rows, seed):
    """Two overlapping clouds in four columns of very different scale."""
    generator = np.random.default_rng(seed)
    targets = (generator.random(num_rows) < 0.3).astype(np.float32)
    inputs = generator.normal(size=(num_rows, 4)) + targets[:, None]
    return Split(inputs=inputs * [1, 10, 100, 0.1], targets=targets)


class Blobs(Task):
    """Tell two clouds apart."""

    name = "blobs"
    defaults = {"lr": 0.01, "hidden": 8, "batch_size": 32}
    search_space = {"lr": loguniform(1e-3, 1e-1), "hidden": choice([4, 8, 16])}
    objective = Maximize("accuracy")

    def data(self, source):
        seed = int(source.rpartition("/")[2])
        return Splits(train=cloud(300, seed), validation=cloud(100, seed + 1), test=cloud(200, 99))

    def model(self, params):
        hidden = int(params["hidden"])
        return nn.Sequential(
            nn.Linear(4, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 1), nn.Flatten(0)
        )

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}


class LosesWorker(Blobs):
    """Kills the second of two workers once, in its third epoch; the marker says that it did."""

    defaults = {**Blobs.defaults, "marker": ""}

    def __init__(self):
        self.num_steps = 0
        self.marker = Path()

    def model(self, params):
        self.marker = Path(params["marker"])
        return super().model(params)

    def step(self, model, batch):
        import ray.train

        self.num_steps += 1
        is_second = ray.train.get_context().get_world_rank() == 1
        if self.num_steps == 25 and is_second and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(model, batch)


class Notes(Blobs):
    """Adds a line to the marker's file for each epoch that is measured, and takes its time."""

    defaults = {**Blobs.defaults, "marker": ""}

    def model(self, params):
        self.marker = Path(params["marker"])
        return super().model(params)

    def metrics(self, outputs, targets):
        with self.marker.open("a") as file:
            file.write("measured\n")
        time.sleep(0.2)
        return super().metrics(outputs, targets)


class Saves(Notes):
    """Leaves a checkpoint after each epoch, whatever that takes of the time."""

    def model(self, params):
        from minga.training import train

        train.CHECKPOINT_SHARE = float("inf")
        return super().model(params)


class Crowd(Notes):
    """Writes down how many processes are measuring at the moment, itself among them."""

    def metrics(self, outputs, targets):
        mine = self.marker.with_name(f"present-{os.getpid()}")
        mine.touch()
        time.sleep(0.1)
        with self.marker.open("a") as file:
            file.write(f"{len(list(mine.parent.glob('present-*')))}\n")
        mine.unlink()
        return Blobs.metrics(self, outputs, targets)


class Pieces(Blobs):
    """Draws nothing while it trains, and takes no more than eight examples at a time."""

    def model(self, params):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))

    def step(self, model, batch):
        assert not torch.is_grad_enabled() or len(batch.inputs) <= 8
        return super().step(model, batch)


class BreaksInStep(Blobs):
    """Has a bug that shows after some steps."""

    def step(self, model, batch):
        if torch.is_grad_enabled() and len(batch.inputs) == 32:
            raise ValueError("a bug of the researcher")
        return super().step(model, batch)


class Diverges(Blobs):
    """Searches only where the loss is soon no number."""

    search_space = {"lr": choice([1e30])}


class WrongShape(Blobs):
    """Its model takes five columns, its data has four."""

    def model(self, params):
        return nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))


class NoMetrics:
    """Is no Task at all."""


class Unfinished(Task):
    """Lacks all but its name and its data."""

    name = "unfinished"

    def data(self, source):
        return None


class BadName(Blobs):
    """Its name would not do as a registered model's."""

    name = "Bad Name"


class NoDefault(Blobs):
    """Searches what has no default."""

    search_space = {"depth": choice([1, 2])}


class BadObjective(Blobs):
    """Says its objective as a string."""

    objective = "accuracy"


class SearchesNothing(Blobs):
    """Has no search space."""

    search_space = {}
