"""Drives Flower's strategies as Flower does, without any of Minga: what the tests compare with."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid

from minga.federation.flower.runtime import be_a_node

Arrays = list[np.ndarray]
Train = Callable[[int, Arrays], list[tuple[Arrays, int]]]
"""(round, global arrays) -> each client's arrays and count of examples."""


class _Client(ClientProxy):
    """A client that nobody calls."""

    get_properties = get_parameters = fit = evaluate = reconnect = lambda *_: None


def drive_older(strategy: Any, arrays: Arrays, train: Train, *, num_rounds: int) -> Arrays:
    """Take rounds with a strategy of `flwr.server.strategy`."""
    for number in range(1, num_rounds + 1):
        results = [
            (
                _Client(str(place)),
                FitRes(Status(Code.OK, ""), ndarrays_to_parameters(trained), count, {}),
            )
            for place, (trained, count) in enumerate(train(number, arrays))
        ]
        parameters, _ = strategy.aggregate_fit(number, results, [])
        arrays = parameters_to_ndarrays(parameters)
    return arrays


class _Nodes(Grid):
    """Some nodes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(10, 10 + self.count))

    set_run = create_message = push_messages = pull_messages = send_and_receive = None
    run = None


def drive_newer(strategy: Any, arrays: Arrays, train: Train, *, num_rounds: int) -> Arrays:
    """Take rounds with a strategy of `flwr.serverapp.strategy`."""
    be_a_node(1)
    for number in range(1, num_rounds + 1):
        clients = train(number, arrays)
        nodes = _Nodes(len(clients))
        told = strategy.configure_train(number, ArrayRecord(arrays), ConfigRecord(), nodes)
        by_node = {message.metadata.dst_node_id: message for message in told}
        replies = []
        for node_id, (trained, count) in zip(sorted(by_node), clients, strict=True):
            record = ArrayRecord({str(n): Array(value) for n, value in enumerate(trained)})
            metrics = MetricRecord({"num-examples": count})
            content = RecordDict({"a": record, "m": metrics})
            replies.append(Message(content, reply_to=by_node[node_id]))
        record, _ = strategy.aggregate_train(number, replies)
        arrays = record.to_numpy_ndarrays()
    return arrays
