"""The training loop: the only one, for search, Ray Train, devices and baselines.

The examples of an epoch are shuffled by (seed, epoch) alone. So training that goes on from a
checkpoint sees what it would have seen, and several workers that each take their part of every
batch compute the step that one worker would have computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minga.training.errors import DataError, DivergedError
from minga.training.evaluate import evaluate
from minga.training.history import Record
from minga.training.network import batch_of, one_thread
from minga.training.space import Params
from minga.training.task import Batch, Split, Task

BATCH_SIZE = 64
"""Examples of one step over all workers, unless the parameters say `batch_size`."""

MAX_GRAD_NORM = 5.0
"""Longer gradients are scaled down to this norm, unless the parameters say `max_grad_norm`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which worker this is, of how many; each takes its part of every batch."""

    rank: int = 0
    num_workers: int = 1


WHOLE = Shard()


class Learner:
    """A network in training: what a checkpoint must keep.

    Attributes:
        network: the Task's network, or its wrapper that averages gradients over workers.
        history: the records of the epochs that are behind it.
    """

    def __init__(self, task: Task, network: nn.Module, params: Params) -> None:
        self.task = task
        self.network = network
        self.params = params
        self.optimiser = task.optimiser(network, params)
        self.history: list[Record] = []

    def state(self) -> dict[str, Any]:
        """Give what `load` needs, of types that `torch.load(weights_only=True)` accepts."""
        return {
            "network": self.bare_network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self.bare_network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.history = list(state["history"])

    @property
    def bare_network(self) -> nn.Module:
        """The Task's network without a wrapper."""
        wrapped = getattr(self.network, "module", self.network)
        assert isinstance(wrapped, nn.Module)
        return wrapped


def fit(
    learner: Learner,
    train: Split,
    *,
    epochs: int,
    seed: int,
    validation: Split | None = None,
    shard: Shard = WHOLE,
    on_epoch: Callable[[Record], bool] | None = None,
    on_gradient: Callable[[], None] | None = None,
) -> list[Record]:
    """Train until `epochs` epochs are behind the learner, those of an earlier call included.

    Args:
        learner: is changed in place.
        train: all examples, also those of other workers.
        epochs: of passes over `train`.
        seed: decides the order of examples and what layers draw, such as dropout.
        validation: is measured after each epoch if given.
        shard: this worker's part of every batch.
        on_epoch: gets each epoch's record; training ends early if it returns True.
        on_gradient: is called in every step when the loss's gradient is there, before it is
            clipped; it may change the gradient in place.

    Returns:
        the learner's whole history.

    Raises:
        DataError: there are fewer examples than workers.
        DivergedError: the loss is no longer a finite number.
    """
    if len(train) < shard.num_workers:
        raise DataError(
            f"{len(train)} training examples for {shard.num_workers} workers; "
            "give more examples or fewer workers"
        )
    batch_size = int(learner.params.get("batch_size", BATCH_SIZE))
    examples = batch_of(train)
    with one_thread():
        for epoch in range(len(learner.history), epochs):
            record: Record = {"epoch": epoch + 1}
            torch.manual_seed(epoch_seed(seed, epoch) + shard.rank)
            batches = _batches(examples, batch_size, epoch_seed(seed, epoch), shard)
            record["train_loss"] = _train_epoch(learner, batches, epoch, on_gradient)
            if validation is not None:
                record |= evaluate(learner.task, learner.bare_network, validation)
            learner.history.append(record)
            if on_epoch is not None and on_epoch(record):
                break
    return learner.history


def _train_epoch(
    learner: Learner,
    batches: Iterator[Batch],
    epoch: int,
    on_gradient: Callable[[], None] | None,
) -> float:
    """Take one step for each batch and give the mean of their losses."""
    max_norm = float(learner.params.get("max_grad_norm", MAX_GRAD_NORM))
    learner.network.train()
    losses: list[Tensor] = []
    for batch in batches:
        loss = learner.task.step(learner.network, batch)
        learner.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if on_gradient is not None:
            on_gradient()
        nn.utils.clip_grad_norm_(learner.network.parameters(), max_norm)
        learner.optimiser.step()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean()
    if not torch.isfinite(mean):
        raise DivergedError(
            f"the loss became {float(mean)} in epoch {epoch + 1} with params "
            f"{dict(learner.params)}; a smaller lr usually helps"
        )
    return float(mean)


def _batches(examples: Batch, batch_size: int, seed: int, shard: Shard) -> Iterator[Batch]:
    """Cut the shuffled examples into batches and take this worker's part of each."""
    for part in batch_places(len(examples.inputs), batch_size, seed, shard):
        yield Batch(examples.inputs[part], examples.targets[part])


def batch_places(
    num_examples: int, batch_size: int, seed: int, shard: Shard = WHOLE
) -> Iterator[Tensor]:
    """Give the places of the examples of each batch of one epoch, for this worker.

    Workers must take equally many steps of equal size, so what does not divide by their number is
    left out; so is a lone last example, on which batch normalisation fails. Shuffling anew each
    epoch leaves out others.
    """
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    for whole in torch.split(order, max(batch_size, 2 * shard.num_workers)):
        share = len(whole) // shard.num_workers
        part = whole[shard.rank * share : (shard.rank + 1) * share]
        if len(part) > 1 or num_examples < 2 * shard.num_workers:
            yield part


def epoch_seed(seed: int, epoch: int) -> int:
    """Give seeds that neighbouring epochs, seeds and ranks do not share."""
    return (seed * 1_000_003 + epoch) * 1_009 % 2**62
