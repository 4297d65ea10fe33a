"""Flower's simulation engine: 1,000 nodes on its Ray backend, with the cohorts that it is given.

Any sampled node does for any device: which one it is to be comes with the round's configuration, so
that everybody trains the same devices.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = str(Path.cwd())  # Ray's processes load the clients from here

from flwr.common import Context, FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from harness import answer_requests
from rivals.flower_clients import app
from rivals.simulation_work import Work, pace


class Cohorts(FedAvg):
    """Federated averaging over given cohorts."""

    def __init__(self, work: Work, file: str) -> None:
        cohort = work.cohorts.shape[1]
        super().__init__(
            fraction_fit=cohort / len(work.devices),
            fraction_evaluate=0.0,
            min_fit_clients=cohort,
            min_available_clients=len(work.devices),
            initial_parameters=ndarrays_to_parameters(work.first),
        )
        self.stamps: list[float] = []
        self.weights: list[Any] = []
        self._work = work
        self._file = file

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Tell each sampled node which device it is."""
        cohort = self._work.cohorts[server_round - 1]
        nodes = client_manager.sample(len(cohort), len(self._work.devices))
        told = ({"device": int(device), "work": self._file} for device in cohort)
        return [
            (node, FitIns(parameters, config)) for node, config in zip(nodes, told, strict=True)
        ]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Average, and note when that is done."""
        assert not failures
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.weights = parameters_to_ndarrays(parameters)
        self.stamps.append(time.perf_counter())
        return parameters, metrics


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = Work.load(request["work"])
    strategy = Cohorts(work, request["work"])

    def server_fn(_context: Context) -> ServerAppComponents:
        config = ServerConfig(num_rounds=len(work.cohorts))
        return ServerAppComponents(strategy=strategy, config=config)

    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=app,
        num_supernodes=len(work.devices),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": os.cpu_count(), "log_to_driver": False},
        },
    )
    return {"pace": pace(strategy.stamps), "accuracy": work.accuracy(strategy.weights)}


if __name__ == "__main__":
    answer_requests(answer)
