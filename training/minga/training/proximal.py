"""FedProx on a device: training that is pulled back to where it started.

Li et al., "Federated optimization in heterogeneous networks", MLSys 2020: a device minimises
`F(w) + mu / 2 * ||w - w_0||^2` (equation 2), its own loss F and the distance to the global model
w_0, so that devices with unlike data, or with unlike numbers of steps, do not drift as far apart.
"""

import torch
from torch import nn


class Pull:
    """Adds the gradient of `mu / 2 * ||w - w_0||^2` to a network's own, exactly `mu * (w - w_0)`.

    It covers the parameters that are trained; w_0 is what they are when this is made. What the
    loss does not reach has no gradient, does not move, and so needs no pull.
    """

    def __init__(self, network: nn.Module, mu: float) -> None:
        self._mu = mu
        self._starts = [
            (parameter, parameter.detach().clone())
            for parameter in network.parameters()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Change the gradients of this step in place."""
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)
