"""The server's side: FedAvg as it comes, with the time of each round taken."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that notes when each round's messages are made and when its mean is there."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.started: list[float] = []
        self.ended: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        self.started.append(time.time())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End a round."""
        result = super().aggregate_train(server_round, replies)
        self.ended.append(time.time())
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write down what they took."""
    config = context.run_config
    num_nodes = int(config["num-nodes"])
    strategy = TimedFedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=num_nodes,
        min_available_nodes=num_nodes,
    )
    halves = np.split(np.zeros(int(config["num-values"]), np.float32), 2)
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(halves), num_rounds=int(config["num-rounds"])
    )
    weights = np.concatenate(result.arrays.to_numpy_ndarrays())
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    report = {
        "started": strategy.started,
        "ended": strategy.ended,
        "least": float(weights.min()),
        "most": float(weights.max()),
        "peak_bytes": int(peak.split()[1]) * 1024,
    }
    file = Path(str(config["report"]))
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(report), encoding="utf-8")
    temporary.replace(file)
