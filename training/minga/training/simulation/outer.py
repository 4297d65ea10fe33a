"""Gradient descent of many devices that begin with the same dense network.

A dense layer's gradient is a sum of outer products over the examples of a batch: of what the loss
says of the layer's output, and of its input. With h_k the input at example k, g_k the gradient at
the output there, and r the learning rate, a device's weights after some steps are

    W - sum_k r g_k h_k^T

and what they make of an input x is W x - sum_k r g_k (h_k . x). The first part is one product with
one matrix for all devices together; the second is small as long as a device has seen few examples.
So weights are built only when examples have come together that take about as much as they do, and
the last ones' part goes into the change that a device sends, at once. No gradient is ever built.

Gradients' lengths, for clipping, come from inner products as well: |sum_k g_k h_k^T|^2 =
sum_kl (g_k . g_l) (h_k . h_l) (Goodfellow, "Efficient per-example gradient computations",
arXiv:1510.01799, 2015). Mostly sum_k |g_k| |h_k| is below the limit, so that they need not.

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

ROUNDING: Final = 1e-4
"""More than bounds and sums of float32 are off by."""

MAX_SHARE: Final = 2.0
"""So many times the values of a layer's weights may the inputs and gradients of a device's examples
have before they are made weights."""

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
    rate = rates.pop()
    return rate if rate > 0 and not rates else None


def room_for(network: DenseNetwork) -> int:
    """Give how many of a device's examples are remembered before they are made weights."""
    layers = [layer for _, layer in network.layers if isinstance(layer, nn.Linear)]
    num_weights = sum(layer.weight.numel() for layer in layers)
    width = sum(layer.in_features + layer.out_features for layer in layers)
    return int(MAX_SHARE * num_weights / max(width, 1))


class Scratch:
    """Memory that is used again: pages of new memory cost as much as what is computed in them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Give a tensor of any values, until the same name is taken again."""
        size, kept = prod(shape), self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = like.new_empty(size)
        return kept[:size].view(shape)


class Descent:
    """Some steps of devices that begin with the same network.

    Args:
        scratch: of nobody else at the same time.
        network: a chain of layers.
        values: its parameters and buffers by name.
        rate: the learning rate.
        num_devices: how many devices there are.
        room: how many examples of each are remembered; no batch is longer.
    """

    def __init__(
        self,
        scratch: Scratch,
        network: DenseNetwork,
        values: Mapping[str, Tensor],
        *,
        rate: float,
        num_devices: int,
        room: int,
    ) -> None:
        self._rate = rate
        self._room = room
        self._num_seen = 0
        self._parts: list[_Part] = []
        for name, layer in network.layers:
            if isinstance(layer, nn.Linear):
                self._parts.append(_Dense(scratch, name, values, (num_devices, room)))
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
        if self._num_seen + inputs.shape[1] > self._room:
            for dense in self._dense:
                dense.build()
            self._num_seen = 0
        self._num_seen += inputs.shape[1]
        hidden = inputs
        for part in self._parts:
            hidden = part.forward(hidden)
        # What follows is linear in this gradient, so moves are computed in its place.
        move = gradient_of(hidden).mul_(-self._rate)
        for part in reversed(self._parts[self._first + 1 :]):
            move = part.backward(move)
        self._dense[0].keep(move)  # nothing is learnt from what is before it
        self._clip(self._rate * max_norm)

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Give how much each parameter changed on each device: a name, and a stack.

        A stack holds until the next one is asked for. No step can be taken any more.
        """
        for dense in self._dense:
            yield from dense.changes()

    def _clip(self, longest: float) -> None:
        """Shorten the moves of the batch under way, each device's by itself."""
        most = torch.stack([dense.most_squared() for dense in self._dense]).sum(0)
        if bool((most < (1 - ROUNDING) * longest**2).all()):
            return
        squares = torch.stack([dense.squared() for dense in self._dense]).sum(0)
        norms = squares.clamp_min_(0.0).sqrt_()
        factors = longest / (norms + 1e-6 * self._rate)
        if bool((factors < 1).any()):
            for dense in self._dense:
                dense.shorten(factors.clamp(max=1.0).view(-1, 1, 1))


class _Part(Protocol):
    """A layer: outputs from inputs, and the move at the inputs from that at the outputs."""

    def forward(self, inputs: Tensor) -> Tensor: ...

    def backward(self, move: Tensor) -> Tensor: ...


class _Elementwise:
    """A layer without parameters, by automatic differentiation."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self._layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        self._inputs = inputs.detach().requires_grad_()
        self._outputs = self._layer(self._inputs)
        return self._outputs.detach()

    def backward(self, move: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self._outputs, self._inputs, move)
        return found


class _Rectified:
    """The usual one of these, in place."""

    def forward(self, inputs: Tensor) -> Tensor:
        self._outputs = inputs.clamp_(min=0.0)
        return self._outputs

    def backward(self, move: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.threshold_backward(move, self._outputs, 0)
        return found


class _Dense:
    """A dense layer of many devices that began with the same weights.

    Attributes:
        name: prefix of its parameters' names.
        weight: at the start, shape `(outputs, inputs)`.
        bias: likewise, shape `(outputs,)`, or None.
        built: devices' weights and biases, once they are built.
        inputs: of the examples that are remembered, shape `(devices, room, inputs)`.
        moves: gradients at the outputs times minus the learning rate, shape
            `(devices, room, outputs)`.
        before: how many examples are remembered of batches before the one under way.
        seen: likewise, with that one.
        begun: how many devices took the step that is remembered longest.
        count: how many devices take the one under way.
    """

    def __init__(
        self, scratch: Scratch, name: str, values: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> None:
        self.name = name
        self.weight = values[f"{name}weight"]
        self.bias = values.get(f"{name}bias")
        num_outputs, num_inputs = self.weight.shape
        self.built: tuple[Tensor, Tensor | None] | None = None
        self.inputs = scratch.take(f"{name} inputs", (*shape, num_inputs), self.weight)
        self.moves = scratch.take(f"{name} moves", (*shape, num_outputs), self.weight)
        self.before = self.seen = 0
        self.begun = self.count = shape[0]
        self._scratch = scratch

    def forward(self, inputs: Tensor) -> Tensor:
        """Give outputs of a batch, shape `(devices, batch, outputs)`."""
        self.count, batch, _ = inputs.shape
        self.before, self.seen = self.seen, self.seen + batch
        if not self.before:
            self.begun = self.count
        self._put(self.inputs, inputs)
        shape = (self.count, batch, len(self.weight))
        outputs = self._scratch.take(f"{self.name} outputs", shape, inputs)
        if self.built is None:
            rows, flat = inputs.reshape(-1, inputs.shape[-1]), outputs.view(-1, len(self.weight))
            if self.bias is None:
                torch.mm(rows, self.weight.t(), out=flat)
            else:
                torch.addmm(self.bias, rows, self.weight.t(), out=flat)
        else:
            weight, bias = self.built
            if bias is None:
                torch.bmm(inputs, weight[: self.count].transpose(1, 2), out=outputs)
            else:
                own = bias[: self.count].unsqueeze(1)
                torch.baddbmm(own, inputs, weight[: self.count].transpose(1, 2), out=outputs)
        if self.before:
            earlier = self.inputs[: self.count, : self.before]
            likeness = self._likeness(inputs, earlier)
            outputs.baddbmm_(likeness, self.moves[: self.count, : self.before])
        return outputs

    def keep(self, move: Tensor) -> None:
        """Take the move at the outputs of the batch under way."""
        self._put(self.moves, move)

    def backward(self, move: Tensor) -> Tensor:
        """Take the move at the outputs, and give the one at the inputs."""
        self.keep(move)
        found = move @ self.weight if self.built is None else move @ self.built[0][: self.count]
        if self.before:
            earlier = self.moves[: self.count, : self.before]
            towards = torch.bmm(move, earlier.transpose(1, 2))
            found.baddbmm_(towards, self.inputs[: self.count, : self.before])
        return found

    def most_squared(self) -> Tensor:
        """Give what no device's move in this batch is longer than, squared; shape `(devices,)`."""
        lengths: Tensor = torch.linalg.vector_norm(self._batch(self.inputs), dim=2)
        if self.bias is not None:
            lengths = lengths.square_().add_(1.0).sqrt_()
        moves = torch.linalg.vector_norm(self._batch(self.moves), dim=2)
        return lengths.mul_(moves).sum(1).square_()

    def squared(self) -> Tensor:
        """Give the squared length of each device's move in this batch, shape `(devices,)`."""
        moves, inputs = self._batch(self.moves), self._batch(self.inputs)
        products = torch.bmm(moves, moves.transpose(1, 2))
        return products.mul_(self._likeness(inputs, inputs)).sum((1, 2))

    def shorten(self, factors: Tensor) -> None:
        """Scale each device's move in this batch, by factors of shape `(devices, 1, 1)`."""
        self._batch(self.moves).mul_(factors)

    def build(self) -> None:
        """Build devices' weights of the examples so far, and forget these."""
        moves, inputs = self._remembered()
        if self.built is None:
            stack = self._scratch.take(
                f"{self.name} built", (self.begun, *self.weight.shape), moves
            )
            torch.baddbmm(self.weight, moves.transpose(1, 2), inputs, out=stack)
            self.built = stack, None if self.bias is None else self.bias + moves.sum(1)
        else:
            weight, bias = self.built
            weight[: self.begun].baddbmm_(moves.transpose(1, 2), inputs)
            if bias is not None:
                bias[: self.begun] += moves.sum(1)
        self.before = self.seen = 0

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Give how much weights and biases changed: a name, and a stack."""
        if self.built is not None:
            if self.seen:
                self.build()
            weight, bias = self.built
            yield f"{self.name}weight", weight.sub_(self.weight)
            if bias is not None and self.bias is not None:
                yield f"{self.name}bias", bias.sub_(self.bias)
            return
        moves, inputs = self._remembered()
        change = self._scratch.take("change", (self.begun, *self.weight.shape), moves)
        yield f"{self.name}weight", torch.bmm(moves.transpose(1, 2), inputs, out=change)
        if self.bias is not None:
            yield f"{self.name}bias", moves.sum(1)

    def _put(self, memory: Tensor, batch: Tensor) -> None:
        """Remember a batch; devices that are done learn nothing from it."""
        place = slice(self.before, self.seen)
        memory[: self.count, place] = batch
        memory[self.count : self.begun, place] = 0.0

    def _batch(self, memory: Tensor) -> Tensor:
        return memory[: self.count, self.before : self.seen]

    def _remembered(self) -> tuple[Tensor, Tensor]:
        """Give all moves and inputs that are remembered."""
        return self.moves[: self.begun, : self.seen], self.inputs[: self.begun, : self.seen]

    def _likeness(self, some: Tensor, others: Tensor) -> Tensor:
        """Give inner products of inputs, with the 1 that a bias's is."""
        found = torch.bmm(some, others.transpose(1, 2))
        return found if self.bias is None else found.add_(1.0)
