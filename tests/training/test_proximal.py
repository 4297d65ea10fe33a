"""FedProx on a device: training that is pulled back to where it started."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from minga.federation.parameters import to_bytes
from minga.training import Minimize, Split, Splits, Task
from minga.training.federated import TaskTrainer
from minga.training.network import build_network, parameters_of
from minga.training.proximal import Pull

TARGET = np.array([3.0, -1.0], np.float32)
START = np.array([1.0, 1.0], np.float32)


class Point(nn.Module):
    """Answers with its own parameter, whatever it is asked; one more is not trained."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, inputs):
        return self.w.expand(len(inputs), 2)


class Quadratic(Task):
    """The loss is half the squared distance of w from the mean target; SGD without tricks."""

    name = "quadratic"
    defaults: ClassVar = {"lr": 0.2, "batch_size": 64, "max_grad_norm": 1e9}
    objective = Minimize("loss")

    def data(self, source):
        split = Split(inputs=np.zeros((4, 1)), targets=np.tile(TARGET, (4, 1)))
        return Splits(train=split, validation=split, test=split)

    def preparation(self, train):
        return nn.Identity()

    def model(self, params):
        return Point()

    def optimiser(self, model, params):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], params["lr"])

    def loss(self, outputs, targets):
        return 0.5 * (outputs - targets).square().sum(dim=1).mean()

    def metrics(self, outputs, targets):
        return {}


@pytest.fixture
def trainer():
    """A site whose own optimum is TARGET."""
    return TaskTrainer(Quadratic(), Quadratic().data(""))


@pytest.fixture
def parameters():
    """A global model at START."""
    return {"model.w": START, "model.frozen": np.ones(2, np.float32), "model.idle": START}


@pytest.mark.parametrize("mu", [0.01, 1.0, 3])
def test_optimum_lies_between(trainer, parameters, mu):
    """Training ends where F(w) + mu / 2 * ||w - w_0||^2 is least: a mean, weighted 1 to mu."""
    update = trainer.fit(parameters, {"epochs": 200, "proximal_mu": mu})
    optimum = (TARGET + mu * START) / (1 + mu)
    np.testing.assert_allclose(START + update.delta["model.w"], optimum, atol=1e-5)
    assert not np.any(update.delta["model.frozen"])
    assert not np.any(update.delta["model.idle"])


def test_first_step_feels_no_pull(trainer, parameters):
    """At the start the pull is zero: one step is that of plain training, bit by bit."""
    plain, pulled = (trainer.fit(parameters, {"proximal_mu": mu}).delta for mu in (0.0, 5.0))
    assert to_bytes(plain) == to_bytes(pulled)


def test_gradient_is_that_of_the_penalty():
    """The pull adds what differentiating the penalty adds."""
    point = Point()
    pull = Pull(point, 0.7)
    start = point.w.detach().clone()
    with torch.no_grad():
        point.w.add_(torch.tensor([0.25, -4.0]))
    inputs, target = torch.zeros(4, 1), torch.from_numpy(TARGET)
    loss = (point(inputs) - target).square().mean()
    (expected,) = torch.autograd.grad(
        loss + 0.7 / 2 * (point.w - start).square().sum(), point.w, retain_graph=True
    )
    loss.backward()
    pull()
    torch.testing.assert_close(point.w.grad, expected)
    assert point.idle.grad is None
    assert point.frozen.grad is None


def test_no_pull_changes_nothing(blobs):
    """Without proximal_mu, and with zero, an update is the same, byte by byte; dropout included."""
    trainer = TaskTrainer(blobs, blobs.data("20"))
    start = parameters_of(build_network(blobs, blobs.defaults, blobs.data("1").train, seed=1))
    plain, zero, pulled = (
        to_bytes(trainer.fit(start, {"epochs": 3, **config}).delta)
        for config in ({}, {"proximal_mu": 0.0}, {"proximal_mu": 0.1})
    )
    assert plain == zero
    assert plain != pulled


def test_stronger_pull_keeps_nearer(blobs):
    """The stronger the pull, the shorter the update."""
    trainer = TaskTrainer(blobs, blobs.data("20"))
    start = parameters_of(build_network(blobs, blobs.defaults, blobs.data("1").train, seed=1))
    lengths = [
        sum(float(np.square(value).sum()) for value in update.delta.values())
        for mu in (0.0, 0.1, 10.0)
        for update in [trainer.fit(start, {"epochs": 5, "proximal_mu": mu})]
    ]
    assert lengths[0] > lengths[1] > lengths[2] > 0


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf"), "strong", True])
def test_impossible_pull(trainer, parameters, mu):
    """What is no number from zero on is refused, with the value."""
    with pytest.raises(ValueError, match=r"proximal_mu is .*; give a number from 0 on"):
        trainer.fit(parameters, {"proximal_mu": mu})
