"""Networks that are nothing but dense layers, computed for many devices by batched products.

This is what `torch.func.vmap` comes to for them, without the cost of finding that out in each step:
for stacks of small layers about a third of the time.
"""

import copy
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from minga.training.preparation import Standardize

ELEMENTWISE: Final = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Identity,
)
"""Layers without parameters that treat each number alone."""


class DenseNetwork:
    """A chain of dense and elementwise layers, for many devices at once.

    Args:
        network: one device's.

    Attributes:
        layers: in their order, each with the prefix of its parameters' names.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = list(_chain("", network))

    def __call__(self, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Give outputs of shape `(num_devices, batch, outputs)`.

        Args:
            values: parameters and buffers by name, a first axis for the devices before their own.
            inputs: shape `(num_devices, batch, columns)`.
        """
        hidden = inputs
        for name, layer in self.layers:
            if not isinstance(layer, nn.Linear):
                hidden = apply(name, layer, values, hidden)
                continue
            weight = values[f"{name}weight"].transpose(1, 2)
            if layer.bias is None:
                hidden = torch.bmm(hidden, weight)
            else:
                hidden = torch.baddbmm(values[f"{name}bias"].unsqueeze(1), hidden, weight)
        return hidden


def apply(name: str, layer: nn.Module, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Compute a layer that is no dense one.

    Args:
        name: prefix of its buffers' names.
        layer: one of those that a `DenseNetwork` has.
        values: by name; each buffer has a first axis for the devices, if only of length 1.
        inputs: shape `(num_devices, batch, columns)`.
    """
    if not isinstance(layer, Standardize):
        made: Tensor = layer(inputs)
        return made
    mean, scale = values[f"{name}mean"].unsqueeze(-2), values[f"{name}scale"].unsqueeze(-2)
    scaled = (inputs - mean) / scale
    # As there: a missing value is the column's mean.
    return torch.where(torch.isnan(inputs), torch.zeros_like(scaled), scaled)


def _chain(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Give the layers of a chain in their order, each with the prefix of its parameters' names."""
    # Exact types: a class derived from one of these may compute anything.
    if type(module) is nn.Sequential:
        return [
            layer
            for part, child in module.named_children()
            for layer in _chain(f"{name}{part}.", child)
        ]
    if type(module) in (nn.Linear, Standardize, *ELEMENTWISE):
        hooks = module._forward_hooks or module._forward_pre_hooks
        if not hooks:
            return [(name, _apart(module))]
    raise ValueError(f"{name or 'the network'} is a {type(module).__name__}, no dense layer")


def _apart(module: nn.Module) -> nn.Module:
    """Give a layer that leaves its inputs as they are."""
    if not getattr(module, "inplace", False):
        return module
    copied = copy.copy(module)
    copied.inplace = False  # type: ignore[assignment]
    return copied
