"""A few steps of gradient descent of many devices, without building any device's weights.

A dense layer's gradient is a sum of outer products over the examples of a batch: of what the loss
says of the layer's output, and of its input. With h_k the input at example k, g_k the gradient at
the output there, and r the learning rate, a device's weights after some steps are

    W - sum_k r g_k h_k^T

and what they make of an input x is W x - sum_k r g_k (h_k . x). The first part is one product with
one matrix for all devices together; the second is small as long as a device has seen few examples.
Weights are computed once, at the end. Gradients' lengths, for clipping, come from inner products as
well: |sum_k g_k h_k^T|^2 = sum_kl (g_k . g_l) (h_k . h_l) (Goodfellow, "Efficient per-example
gradient computations", arXiv:1510.01799, 2015).

For plain gradient descent alone: whatever scales coordinates apart from each other, or keeps a
momentum, leaves no such sum. Each bias is a weight whose input is 1.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from minga.training.simulation.dense import DenseNetwork, apply

MAX_SHARE: Final = 2.0
"""So many times the values of a network may a device's inputs and gradients have; with more of them
weights are faster."""

Gradient = Callable[[Tensor], Tensor]
"""Gives the gradient of the devices' losses at the network's outputs."""


def rate_of(optimiser: torch.optim.Optimizer) -> float | None:
    """Give the learning rate of all parameters; None if it is not one, or no plain descent."""
    if type(optimiser) is not torch.optim.SGD:
        return None
    groups = optimiser.param_groups
    if any(group["momentum"] or group["weight_decay"] or group["maximize"] for group in groups):
        return None
    rates = {float(group["lr"]) for group in groups}
    return rates.pop() if len(rates) == 1 else None


def is_worth_it(network: DenseNetwork | None, num_examples: int) -> bool:
    """Tell whether so many examples of a device take less than its weights."""
    if network is None:
        return False
    layers = [layer for _, layer in network.layers if isinstance(layer, nn.Linear)]
    num_weights = sum(layer.weight.numel() for layer in layers)
    width = sum(layer.in_features + layer.out_features for layer in layers)
    return 0 < num_examples * width <= MAX_SHARE * num_weights


class Scratch:
    """Memory that is used again: pages of new memory cost as much as what is computed in them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Give a tensor of any values, until the same name is taken again."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < prod(shape):
            kept = self._kept[name] = like.new_empty(prod(shape))
        return kept[: prod(shape)].view(shape)


class Descent:
    """Some steps of devices that begin with the same network.

    Args:
        scratch: of nobody else at the same time.
        network: a chain of layers.
        values: its parameters and buffers by name.
        rate: the learning rate.
        num_devices: how many devices there are.
        num_examples: how many examples each will have seen in the end, padding included.
    """

    def __init__(
        self,
        scratch: Scratch,
        network: DenseNetwork,
        values: Mapping[str, Tensor],
        *,
        rate: float,
        num_devices: int,
        num_examples: int,
    ) -> None:
        self._rate = rate
        self._scratch = scratch
        self._parts: list[_Part] = []
        for name, layer in network.layers:
            if isinstance(layer, nn.Linear):
                self._parts.append(_Dense(scratch, name, values, (num_devices, num_examples)))
            elif isinstance(layer, nn.ReLU):
                self._parts.append(_Rectified())
            else:
                self._parts.append(_Elementwise(partial(apply, name, layer, values)))
        self._dense = [part for part in self._parts if isinstance(part, _Dense)]
        self._first = self._parts.index(self._dense[0]) if self._dense else 0

    def step(self, inputs: Tensor, gradient_of: Gradient, max_norm: float) -> None:
        """Take one step of all devices.

        Args:
            inputs: of the first devices, shape `(devices, batch, columns)`; all others have taken
                all their steps.
            gradient_of: the loss's.
            max_norm: longer gradients are scaled down to it, each device's by itself.
        """
        hidden = inputs
        for part in self._parts:
            hidden = part.forward(hidden)
        gradient = gradient_of(hidden)
        for part in reversed(self._parts[self._first + 1 :]):
            gradient = part.backward(gradient)
        self._dense[0].keep(gradient)  # nothing is learnt from what is before it
        squares = torch.stack([dense.squared_norm() for dense in self._dense]).sum(0)
        factors = max_norm / (squares.clamp_min_(0.0).sqrt_() + 1e-6)
        is_long = bool((factors < 1).any())
        move = -self._rate * factors.clamp_(max=1.0).view(-1, 1, 1) if is_long else -self._rate
        for dense in self._dense:
            dense.step(move)

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Give how much each parameter changed on each device: a name, and a stack.

        A stack holds until the next one is asked for.
        """
        for dense in self._dense:
            moves = dense.moves.transpose(1, 2)
            shape = (len(moves), *dense.weight.shape)
            change = self._scratch.take("change", shape, moves)
            yield f"{dense.name}weight", torch.bmm(moves, dense.inputs, out=change)
            if dense.bias is not None:
                yield f"{dense.name}bias", dense.moves.sum(1)


class _Part(Protocol):
    """A layer: outputs from inputs, and the gradient at the inputs from that at the outputs."""

    def forward(self, inputs: Tensor) -> Tensor: ...

    def backward(self, gradient: Tensor) -> Tensor: ...


class _Elementwise:
    """A layer without parameters, by automatic differentiation."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self._layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        self._inputs = inputs.detach().requires_grad_()
        self._outputs = self._layer(self._inputs)
        return self._outputs.detach()

    def backward(self, gradient: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self._outputs, self._inputs, gradient)
        return found


class _Rectified:
    """The usual one of these, in place."""

    def forward(self, inputs: Tensor) -> Tensor:
        self._outputs = inputs.clamp_(min=0.0)
        return self._outputs

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient.mul_(self._outputs > 0)


class _Dense:
    """A dense layer of many devices that began with the same weights.

    Attributes:
        name: prefix of its parameters' names.
        weight: at the start, shape `(outputs, inputs)`.
        bias: likewise, shape `(outputs,)`, or None.
        inputs: of all examples so far and of the batch under way, shape `(devices, k, inputs)`.
        moves: gradients at the outputs, those of examples before the batch under way times minus
            the learning rate, shape `(devices, k, outputs)`.
        likeness: of the batch's inputs and of all inputs, shape `(devices, batch, k)`.
        num_seen: how many examples were before the batch under way.
    """

    def __init__(
        self, scratch: Scratch, name: str, values: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> None:
        self.name = name
        self.weight = values[f"{name}weight"]
        self.bias = values.get(f"{name}bias")
        num_outputs, num_inputs = self.weight.shape
        self.inputs = scratch.take(f"{name} inputs", (*shape, num_inputs), self.weight)
        self.moves = scratch.take(f"{name} moves", (*shape, num_outputs), self.weight)
        self.num_seen = 0
        self._scratch = scratch

    def forward(self, inputs: Tensor) -> Tensor:
        """Give outputs of a batch, shape `(devices, batch, outputs)`."""
        seen, (count, batch, _) = self.num_seen, inputs.shape
        self.inputs[:count, seen : seen + batch] = inputs
        self.inputs[count:, seen : seen + batch] = 0.0
        self.likeness = torch.bmm(inputs, self.inputs[:count, : seen + batch].transpose(1, 2))
        if self.bias is not None:
            self.likeness += 1.0
        shape = (count, batch, len(self.weight))
        outputs = self._scratch.take(f"{self.name} outputs", shape, inputs)
        flat, rows = outputs.view(-1, len(self.weight)), inputs.reshape(-1, inputs.shape[-1])
        if self.bias is None:
            torch.mm(rows, self.weight.t(), out=flat)
        else:
            torch.addmm(self.bias, rows, self.weight.t(), out=flat)
        if seen:
            outputs.baddbmm_(self.likeness[:, :, :seen], self.moves[:count, :seen])
        return outputs

    def keep(self, gradient: Tensor) -> None:
        """Take the gradient at the outputs of the batch under way."""
        count, batch, _ = gradient.shape
        self.moves[:count, self.num_seen : self.num_seen + batch] = gradient
        self.moves[count:, self.num_seen : self.num_seen + batch] = 0.0

    def backward(self, gradient: Tensor) -> Tensor:
        """Take the gradient at the outputs, and give the one at the inputs."""
        self.keep(gradient)
        found = gradient @ self.weight
        if self.num_seen:
            count = len(gradient)
            before = self.moves[:count, : self.num_seen]
            towards = torch.bmm(gradient, before.transpose(1, 2))
            found.baddbmm_(towards, self.inputs[:count, : self.num_seen])
        return found

    def squared_norm(self) -> Tensor:
        """Give the squared length of each device's gradient of the batch, shape `(devices,)`."""
        batch = self._batch()
        own = torch.bmm(batch, batch.transpose(1, 2))
        return own.mul_(self.likeness[:, :, self.num_seen :]).sum((1, 2))

    def step(self, move: Tensor | float) -> None:
        """Move along the gradient, so many times its length: shape `(devices, 1, 1)`, or one."""
        self._batch().mul_(move)
        self.num_seen += self.likeness.shape[1]

    def _batch(self) -> Tensor:
        """Give the gradients of the batch under way."""
        count, batch, _ = self.likeness.shape
        return self.moves[:count, self.num_seen : self.num_seen + batch]
