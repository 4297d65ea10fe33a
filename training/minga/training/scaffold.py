"""SCAFFOLD on a device: gradients that are corrected for how this site's data differs.

Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated learning", ICML 2020,
algorithm 1. Each step's gradient g becomes `g + (c - c_i)`; the site's next variate is the mean of
the g along the way, which for plain gradient descent is the algorithm's option II.
"""

import torch
from torch import nn

from minga.federation.parameters import Parameters


class Correction:
    """Adds `c - c_i` to the gradients of each step, and remembers their mean from before.

    It covers the parameters that are trained; what the loss does not reach has no gradient.
    """

    def __init__(self, network: nn.Module, correction: Parameters) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and name in correction
        }
        self._corrections = {
            name: torch.from_numpy(correction[name]).to(parameter.device)
            for name, parameter in self._parameters.items()
        }
        self._sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._num_steps = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Change the gradients of this step in place."""
        self._num_steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._sums[name].add_(parameter.grad)
                parameter.grad.add_(self._corrections[name])

    def mean_gradient(self) -> Parameters:
        """Give the mean of the uncorrected gradients of all steps so far, at least one."""
        return {name: (total / self._num_steps).cpu().numpy() for name, total in self._sums.items()}
