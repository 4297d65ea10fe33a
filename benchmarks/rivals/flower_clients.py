"""The devices of Flower's simulation: a `NumPyClient` that trains the device it is told to be.

What a process needs again is kept: the data and the network are made once in each.
"""

from functools import cache
from typing import Any

import torch
from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import Context
from rivals.simulation_work import LAYERS, LEARNING_RATE, Work, batches, network


@cache
def kept(file: str) -> tuple[Work, Any]:
    """Give the work and a network, made once in a process."""
    work = Work.load(file)
    return work, network(work.first)


class Device(NumPyClient):
    """One device."""

    def fit(self, parameters: Any, config: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
        """Train from the global weights."""
        work, model = kept(str(config["work"]))
        own = work.devices[int(config["device"])]
        values = zip(LAYERS, parameters, strict=True)
        model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in values})
        optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        loss_of = torch.nn.CrossEntropyLoss()
        data = torch.from_numpy(work.inputs[own]), torch.from_numpy(work.targets[own])
        for inputs, targets in batches(*data):
            optimiser.zero_grad()
            loss_of(model(inputs), targets).backward()
            optimiser.step()
        return [value.detach().numpy() for value in model.parameters()], len(own), {}


def client_fn(_context: Context) -> Client:
    """Make a client, as Flower does for every message."""
    return Device().to_client()


app = ClientApp(client_fn=client_fn)
