"""Strategies as Flower users write them, and some that a round cannot serve."""

import threading

import numpy as np
from flwr.app import ConfigRecord
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedAvgM,
    Strategy,
)
from flwr.serverapp import strategy as newer


class Recorder(FedAvgM):
    """Overrides the step to record it, lowers the learning rate, measures on the server."""

    def __init__(self, first_rate: float = 0.5, **arguments) -> None:
        super().__init__(
            on_fit_config_fn=lambda number: {"lr": first_rate / number, "epochs": number},
            evaluate_fn=lambda number, arrays, config: (
                float(np.abs(arrays[0]).sum()),
                {"n": number},
            ),
            **arguments,
        )
        self.history = []
        self.by_client = {}
        self.lock = threading.Lock()

    def aggregate_fit(self, server_round, results, failures):
        """Average, and note who came and what it came to."""
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        for client, result in results:
            self.by_client[client.cid] = self.by_client.get(client.cid, 0) + result.num_examples
        self.history.append((server_round, len(results), len(failures), parameters))
        return parameters, {**metrics, "rounds": len(self.history)}


def clipped(server_momentum: float, initial_parameters) -> Strategy:
    """Wrap a strategy in another, as Flower's privacy does; this one changes nothing."""
    inner = FedAvgM(server_momentum=server_momentum, initial_parameters=initial_parameters)
    return DifferentialPrivacyServerSideFixedClipping(inner, 1e-12, 1e6, 5)


class ToldApart(FedAvg):
    """Tells each client something else."""

    def configure_fit(self, server_round, parameters, client_manager):
        """Number the clients."""
        told = super().configure_fit(server_round, parameters, client_manager)
        return [(c, FitIns(i.parameters, {"place": n})) for n, (c, i) in enumerate(told)]


class OtherModel(FedAvg):
    """Sends clients something else than the global model."""

    def configure_fit(self, server_round, parameters, client_manager):
        """Send noughts."""
        told = super().configure_fit(server_round, parameters, client_manager)
        noughts = ndarrays_to_parameters([a * 0 for a in parameters_to_ndarrays(parameters)])
        return [(c, FitIns(noughts, i.config)) for c, i in told]


class OwnStart(FedAvg):
    """Starts somewhere else."""

    def initialize_parameters(self, client_manager):
        """Start from one number."""
        return ndarrays_to_parameters([np.zeros(1, np.float32)])


class Caller(FedAvg):
    """Asks clients by itself."""

    def configure_fit(self, server_round, parameters, client_manager):
        """Ask the first client for its parameters."""
        next(iter(client_manager.all().values())).get_parameters(None, None, None)


class Picky(FedAvg):
    """Wants bytes to reach the clients."""

    def configure_fit(self, server_round, parameters, client_manager):
        """Send bytes."""
        told = super().configure_fit(server_round, parameters, client_manager)
        return [(c, FitIns(i.parameters, {"key": b"secret"})) for c, i in told]


class Failing(FedAvg):
    """Fails in the way that it is told."""

    def __init__(self, fault: str, **arguments) -> None:
        super().__init__(**arguments)
        self.fault = fault

    def aggregate_fit(self, server_round, results, failures):
        """Fail."""
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        arrays = parameters_to_ndarrays(parameters)
        match self.fault:
            case "nothing":
                return None, {}
            case "raise":
                raise KeyError("accuracy")
            case "exit":
                raise SystemExit(3)
            case "shape":
                arrays[0] = arrays[0][None]
            case "nan":
                arrays[0] = arrays[0] * np.nan
        return ndarrays_to_parameters(arrays), metrics


class Stateful(FedAvg):
    """Keeps what is no data."""

    def aggregate_fit(self, server_round, results, failures):
        """Make a lock after the constructor."""
        self.later = threading.Lock()
        return super().aggregate_fit(server_round, results, failures)


class Scheduled(newer.FedAdam):
    """The newer kind: changes the configuration, keeps records."""

    def configure_train(self, server_round, arrays, config, grid):
        """Add a schedule."""
        config["lr"] = 0.1 / server_round
        self.told = ConfigRecord(dict(config))
        return super().configure_train(server_round, arrays, config, grid)


nothing = 7
