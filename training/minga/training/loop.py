"""The training loop: the only one, for search, Ray Train, devices and baselines.

The examples of an epoch are shuffled by (seed, epoch) alone. So training that goes on from a
checkpoint sees what it would have seen, and several workers that each take their part of every
batch compute the step that one worker would have computed.

Hyper-parameters that it understands: `batch_size`, `max_grad_norm`, `accumulate` (in how many
pieces a worker computes its part of a batch, where memory is short; the step stays the same), and
those of `minga.training.schedules` and `minga.training.weighting`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from minga.training.errors import DataError, DivergedError
from minga.training.evaluate import device_of, evaluate
from minga.training.history import Record
from minga.training.network import batch_of, one_thread
from minga.training.space import Params
from minga.training.task import Batch, Split, Task
from minga.training.weighting import weights_of

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
        half: the type that the network computes in where it may (Micikevicius et al., "Mixed
            precision training", ICLR 2018): bfloat16, or float16, whose losses are scaled so that
            small gradients do not vanish. None: float32 alone. Weights are float32 in any case.
        schedule: moves the learning rate; `fit` makes it.
        history: the records of the epochs that are behind it.
    """

    def __init__(
        self, task: Task, network: nn.Module, params: Params, *, half: torch.dtype | None = None
    ) -> None:
        self.task = task
        self.network = network
        self.params = params
        self.half = half
        self.optimiser = task.optimiser(network, params)
        self.scaler = torch.amp.GradScaler(device_of(network).type, enabled=half is torch.float16)
        self.schedule: LRScheduler | None = None
        self.history: list[Record] = []
        self._schedule_state: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Give what `load` needs, of types that `torch.load(weights_only=True)` accepts."""
        return {
            "network": self.bare_network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else self._schedule_state,
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self.bare_network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self._schedule_state = state["schedule"]
        self.history = list(state["history"])

    def adopt(self, state: dict[str, Any]) -> None:
        """Go on from another learner's weights, with this one's own rates."""
        own = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimiser.param_groups
        ]
        self.load(state)
        for group, settings in zip(self.optimiser.param_groups, own, strict=True):
            group.update(settings)
        if self._schedule_state is not None:
            rates = [group["lr"] for group in own]
            self._schedule_state = {**self._schedule_state, "base_lrs": rates}

    def plan(self, num_steps: int) -> None:
        """Make the schedule for so many steps in all, where the last one was left."""
        self.schedule = self.task.schedule(self.optimiser, self.params, num_steps)
        if self.schedule is None or self._schedule_state is None:
            return
        self.schedule.load_state_dict(self._schedule_state)
        # Making a schedule sets the first step's rates, and loading one does not set them back.
        for group, rate in zip(
            self.optimiser.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate

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
        TaskError: a hyper-parameter of the loop has no meaning.
    """
    if len(train) < shard.num_workers:
        raise DataError(
            f"{len(train)} training examples for {shard.num_workers} workers; "
            "give more examples or fewer workers"
        )
    batch_size = int(learner.params.get("batch_size", BATCH_SIZE))
    examples = batch_of(train)._replace(weights=weights_of(learner.params, train.targets))
    learner.plan(epochs * -(-len(train) // max(batch_size, 2 * shard.num_workers)))
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
    num_pieces = int(learner.params.get("accumulate", 1))
    parameters = list(learner.network.parameters())
    device = device_of(learner.network)
    learner.network.train()
    losses: list[Tensor] = []
    for batch in batches:
        learner.optimiser.zero_grad()
        losses.append(_add_gradient(learner, batch, num_pieces, device))
        learner.scaler.unscale_(learner.optimiser)
        if on_gradient is not None:
            on_gradient()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        learner.scaler.step(learner.optimiser)
        learner.scaler.update()
        if learner.schedule is not None:
            learner.schedule.step()
    mean = torch.stack(losses).mean()
    if not torch.isfinite(mean):
        raise DivergedError(
            f"the loss became {float(mean)} in epoch {epoch + 1} with params "
            f"{dict(learner.params)}; a smaller lr usually helps"
        )
    return float(mean)


def _add_gradient(learner: Learner, batch: Batch, num_pieces: int, device: torch.device) -> Tensor:
    """Add a batch's gradient to the network's, piece by piece, and give the batch's mean loss.

    Workers talk to each other only with the last piece.
    """
    pieces = _pieces(batch, num_pieces)
    losses: list[Tensor] = []
    for number, piece in enumerate(pieces, start=1):
        with _quiet(learner.network, number < len(pieces)):
            loss = _loss(learner, piece, device)
            if len(pieces) > 1:
                loss = loss * (len(piece.inputs) / len(batch.inputs))
            learner.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _loss(learner: Learner, piece: Batch, device: torch.device) -> Tensor:
    """Give the loss of some examples; what is no different on the CPU takes no time there."""
    if device.type != "cpu":
        piece = piece.each(lambda part: part.to(device))
    if learner.half is None:
        return learner.task.step(learner.network, piece)
    with torch.autocast(device.type, learner.half):
        return learner.task.step(learner.network, piece)


def _pieces(batch: Batch, num_pieces: int) -> list[Batch]:
    """Cut a batch into pieces of at least two examples, on which batch normalisation works."""
    num_pieces = min(num_pieces, len(batch.inputs) // 2)
    if num_pieces <= 1:
        return [batch]
    parts = torch.tensor_split(torch.arange(len(batch.inputs)), num_pieces)
    return [_take(batch, part) for part in parts]


def _take(batch: Batch, places: Tensor) -> Batch:
    return batch.each(lambda array: array[places])


def _quiet(network: nn.Module, quiet: bool) -> contextlib.AbstractContextManager[None]:
    """Keep a wrapper from averaging gradients over workers."""
    if quiet and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def _batches(examples: Batch, batch_size: int, seed: int, shard: Shard) -> Iterator[Batch]:
    """Cut the shuffled examples into batches and take this worker's part of each."""
    for part in batch_places(len(examples.inputs), batch_size, seed, shard):
        yield _take(examples, part)


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
