"""Plain models that a Task can be trained with instead of its own.

Which one a network has is a hyper-parameter, `architecture`; so what is chosen travels as any other
choice does: to the workers, into the lineage, to devices, and into `minga reproduce`.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.training.space import MLP

HIDDEN = (64, 32)
"""Widths of the hidden layers of `mlp`."""


def plain_model(
    name: str, *, preparation: nn.Module, own: nn.Module, example: NDArray[Any]
) -> nn.Module:
    """Build a plain model that takes and gives what the Task's own model does.

    Args:
        name: `linear` or `mlp`.
        preparation: of the network.
        own: the Task's own model, untrained.
        example: at least one input, shape `(n, ...)`.
    """
    few = torch.from_numpy(np.repeat(example[:1], 2, axis=0))
    was_training = own.training
    with torch.inference_mode():
        prepared = preparation(few)
        shape = tuple(own.eval()(prepared).shape[1:])
    own.train(was_training)
    widths = [prepared[0].numel(), *(HIDDEN if name == MLP else ()), int(np.prod(shape))]
    layers: list[nn.Module] = [Floats()]
    for place in range(len(widths) - 1):
        layers += [nn.ReLU()] if place else []
        layers.append(nn.Linear(widths[place], widths[place + 1]))
    return nn.Sequential(*layers, nn.Unflatten(1, shape) if shape else nn.Flatten(start_dim=0))


class Floats(nn.Module):
    """Makes one row of floats of each input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """Flatten inputs of shape `(batch, ...)` to `(batch, values)`."""
        return input.flatten(1).to(torch.float32)
