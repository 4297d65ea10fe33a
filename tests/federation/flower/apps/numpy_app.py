"""The classic style: a NumPyClient, a client_fn, a ClientApp."""

import time

import numpy as np
import ridge
from flwr.app import Context
from flwr.client import ClientApp, NumPyClient


class RidgeClient(NumPyClient):
    """Trains on one partition."""

    def __init__(self, partition_id: int, rate: float = 0.25) -> None:
        self.data = ridge.load_data(partition_id)
        self.rate = rate

    def fit(self, parameters, config):
        """Train; say what was told."""
        if config.get("fail"):
            raise ValueError("no data today")
        time.sleep(config.get("delay", 0))
        epochs = int(config.get("epochs", 1))
        weights = ridge.train(parameters, *self.data, epochs=epochs, rate=self.rate)
        metrics = {"loss": ridge.loss_of(weights, *self.data), "told": ",".join(sorted(config))}
        return weights, len(self.data[0]), metrics

    def evaluate(self, parameters, config):
        """Measure."""
        return (
            ridge.loss_of(parameters, *self.data),
            len(self.data[0]),
            {"bias": float(sum(parameters[1:]))},
        )


class BrokenClient(RidgeClient):
    """Gives back what no model takes."""

    def fit(self, parameters, config):
        """Fail in the way that is asked for."""
        weights, num_examples, metrics = super().fit(parameters, config)
        match config["fault"]:
            case "shape":
                weights[0] = weights[0].reshape(1, 4)
            case "count":
                weights.pop()
            case "nan":
                weights[3] = np.full((), np.nan)
        return weights, num_examples, metrics


def client_fn(context: Context):
    """Make a client for each message, as Flower does."""
    rate = context.run_config.get("learning-rate", 0.25)
    return RidgeClient(context.node_config["partition-id"], rate).to_client()


app = ClientApp(client_fn)
client = RidgeClient(1)
nothing = 7
