"""A Flower app as PyTorch users write it, for the example project's network and data."""

from collections import OrderedDict

import numpy as np
import torch
from flwr.client import ClientApp, NumPyClient
from torch import nn


def build(hidden):
    """Build the network that the project's Task builds."""
    return nn.Sequential(
        nn.Linear(9, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(start_dim=0)
    )


class ShuttleClient(NumPyClient):
    """Trains on one site's readings."""

    def __init__(self, source):
        readings = np.loadtxt(source, np.float32, delimiter=",", skiprows=1)
        inputs = readings[:, :-1]
        self.inputs = torch.from_numpy((inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6))
        self.targets = torch.from_numpy(readings[:, -1].copy())

    def fit(self, parameters, config):
        """Take a few small steps."""
        net = build(config["hidden"])
        keys = net.state_dict().keys()
        state = OrderedDict({k: torch.tensor(v) for k, v in zip(keys, parameters, strict=True)})
        net.load_state_dict(state, strict=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(net(self.inputs), self.targets)
            loss.backward()
            optimizer.step()
        arrays = [value.cpu().numpy() for value in net.state_dict().values()]
        return arrays, len(self.targets), {"loss": loss.item()}


def client_fn(context):
    """Make the client of this site."""
    return ShuttleClient(context.node_config["source"]).to_client()


app = ClientApp(client_fn=client_fn)
