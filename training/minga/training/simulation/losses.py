"""The loss of many devices' batches at once, of which the gradient is each device's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from minga.training.simulation.dense import DenseNetwork
from minga.training.task import Batch, Task

PROBED_EXAMPLES: Final = 32
"""On so many examples it is seen whether a batch's loss is the mean of its examples' losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """One batch for each device; shorter ones are filled up with examples that do not count."""

    inputs: Tensor
    """Shape `(num_devices, longest, ...)`."""
    targets: Tensor
    """Shape `(num_devices, longest, ...)`."""
    sizes: tuple[int, ...]
    """How many examples of each device count; they come first."""

    @property
    def is_even(self) -> bool:
        """True if all batches are of one size."""
        return min(self.sizes) == self.inputs.shape[1]


class StackedLoss:
    """The sum over devices of each one's loss on its batch.

    Args:
        task: whose step and loss it is.
        network: one device's, in training mode.
        examples: some of the training split's.
    """

    def __init__(self, task: Task, network: nn.Module, examples: Batch) -> None:
        self._task = task
        self._step = _Step(task, network)
        self._is_examplewise = self._probe(examples)
        self._dense: DenseNetwork | None = None
        if self._is_examplewise and type(task).step is Task.step:
            try:
                self._dense = DenseNetwork(network)
            except ValueError:
                self._dense = None

    @property
    def dense(self) -> DenseNetwork | None:
        """The network, if it is computed by batched products."""
        return self._dense

    def backward(
        self, stacks: Mapping[str, Tensor], shared: Mapping[str, Tensor], batches: Batches
    ) -> None:
        """Add the sum's gradient to that of the stacks.

        Args:
            stacks: the network's parameters by name, with a first axis for the devices.
            shared: those that are the same for all devices, without it.
            batches: what each device learns from in this step.
        """
        if self._dense is None:
            self._sum(stacks, shared, batches).backward()  # type: ignore[no-untyped-call]
            return
        values = {**{name: value.unsqueeze(0) for name, value in shared.items()}, **stacks}
        outputs = self._dense(values, batches.inputs)
        outputs.backward(self.gradient_at(outputs, batches))  # type: ignore[no-untyped-call]

    def gradient_at(self, outputs: Tensor, batches: Batches) -> Tensor:
        """Give the sum's gradient at a dense network's outputs, of their shape.

        The loss of all devices' examples together is the mean of theirs. So its gradient has each
        example's own, which is scaled to what the example counts on its device.

        Args:
            outputs: shape `(num_devices, longest, ...)`.
            batches: what they are outputs for.
        """
        outputs = outputs.detach().requires_grad_()
        mean = self._task.loss(outputs.flatten(0, 1), batches.targets.flatten(0, 1))
        (gradient,) = torch.autograd.grad(mean, outputs)
        if batches.is_even:
            return gradient * len(batches.sizes)
        weights = _weights(batches) * batches.targets.shape[:2].numel()
        return gradient * weights.view(*weights.shape, *[1] * (outputs.dim() - 2))

    def _sum(
        self, stacks: Mapping[str, Tensor], shared: Mapping[str, Tensor], batches: Batches
    ) -> Tensor:
        """Give the sum, a scalar."""
        if batches.is_even:
            return self._losses(stacks, shared, batches.inputs, batches.targets).sum()
        if self._is_examplewise:
            each = self._example_losses(stacks, shared, batches)
            return (each * _weights(batches)).sum()
        return self._sum_by_size(stacks, shared, batches)

    def _losses(
        self,
        stacks: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Give each device's loss on a batch without padding, shape `(num_devices,)`."""

        def loss(own: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return self._called({**shared, **own}, inputs, targets)

        return vmap(loss)(dict(stacks), inputs, targets)

    def _example_losses(
        self, stacks: Mapping[str, Tensor], shared: Mapping[str, Tensor], batches: Batches
    ) -> Tensor:
        """Give the loss of each example alone, shape `(num_devices, longest)`."""

        def of_device(own: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            values = {**shared, **own}

            def of_example(one: Tensor, target: Tensor) -> Tensor:
                return self._called(values, one.unsqueeze(0), target.unsqueeze(0))

            return vmap(of_example)(inputs, targets)

        return vmap(of_device)(dict(stacks), batches.inputs, batches.targets)

    def _sum_by_size(
        self, stacks: Mapping[str, Tensor], shared: Mapping[str, Tensor], batches: Batches
    ) -> Tensor:
        """Take devices with batches of the same size together."""
        total = torch.zeros((), device=batches.inputs.device)
        for size in sorted(set(batches.sizes)):
            rows = torch.tensor([row for row, own in enumerate(batches.sizes) if own == size])
            rows = rows.to(batches.inputs.device)
            some = {name: stack[rows] for name, stack in stacks.items()}
            inputs, targets = batches.inputs[rows, :size], batches.targets[rows, :size]
            total = total + self._losses(some, shared, inputs, targets).sum()
        return total

    def _called(self, values: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        named = {f"network.{name}": value for name, value in values.items()}
        loss: Tensor = functional_call(self._step, named, (inputs, targets))
        return loss

    def _probe(self, examples: Batch) -> bool:
        """See whether the loss of a batch is the mean of its examples' losses."""
        with torch.no_grad():
            try:
                whole = self._step(examples.inputs, examples.targets)
                singles = [
                    self._step(one.unsqueeze(0), target.unsqueeze(0))
                    for one, target in zip(examples.inputs, examples.targets, strict=True)
                ]
            except (RuntimeError, ValueError, IndexError):  # it cannot take one example
                return False
            return torch.allclose(torch.stack(singles).mean(), whole, rtol=1e-4, atol=1e-6)


class _Step(nn.Module):
    """A Task's training step as a module, so that it can be called with other parameters."""

    def __init__(self, task: Task, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._task = task

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Give the loss of one batch."""
        return self._task.step(self.network, Batch(inputs, targets))


def _weights(batches: Batches) -> Tensor:
    """Give each example's share in its device's mean, zero where it is padding."""
    sizes = torch.tensor(batches.sizes, device=batches.inputs.device).unsqueeze(1)
    places = torch.arange(batches.inputs.shape[1], device=batches.inputs.device)
    return (places < sizes) / sizes
