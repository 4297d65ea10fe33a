"""Flower's SecAgg+, driven in one process: its own client mod and its own server workflow.

Runs in an environment that holds flwr and nothing of Minga; see `harness.Rival`. Messages go from
the workflow to the clients as objects, so neither side pays for a network or for serialising.

Where there was a choice it is in Flower's favour: the strategy is free (Flower's averages as many
identical copies as there are devices), and what a client's own training would take is left out.
"""

import logging
import os
import time
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict
from statistics import median

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    fitres_to_recorddict,
    parameters_to_arrayrecord,
)
from flwr.server import LegacyContext
from flwr.server.client_manager import SimpleClientManager
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.supercore.task_identity import TaskIdentity
from harness import PeakMemory, answer_requests
from rivals.secagg_work import (
    MAX_WEIGHT,
    Case,
    Measurement,
    draw_update,
    exact_mean,
    survivors,
    weight_of,
)

# A Message takes the identity of the process from here.
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class Client:
    """A node: the state that the mod keeps between messages, and the time it took by stage."""

    def __init__(self, case: Case, device: int) -> None:
        self.node_id = device + 1  # 0 is no node
        self.seconds: dict[str, float] = {}
        self._training_s = 0.0
        self._context = Context(1, self.node_id, {}, RecordDict(), {})
        update = ndarrays_to_parameters([draw_update(case, device)])
        status = Status(Code.OK, "")
        self._result = FitRes(status, update, num_examples=weight_of(device), metrics={})

    def receive(self, message: Message) -> Message:
        """Let the mod answer; training is done already."""
        stage = str(_configs(message)[Key.STAGE])
        self._training_s, start = 0.0, time.perf_counter()
        reply = secaggplus_mod(message, self._context, self._train)
        self.seconds[stage] = time.perf_counter() - start - self._training_s
        return reply

    def _train(self, message: Message, _context: Context) -> Message:
        start = time.perf_counter()
        reply = Message(fitres_to_recorddict(self._result, keep_input=True), reply_to=message)
        self._training_s = time.perf_counter() - start
        return reply


class InProcessGrid:
    """Carries messages to clients; those that are lost get nothing from the third stage on."""

    def __init__(self, clients: dict[int, Client], lost: set[int]) -> None:
        self.seconds = 0.0
        self.upload_bytes = 0
        self.memory = PeakMemory()
        self._clients = clients
        self._lost = lost
        self._sent: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Give the answers of the clients that are there."""
        assert timeout is None
        start = time.perf_counter()
        delivered = [_copy(message) for message in messages if self._is_there(message)]
        replies = [self._clients[m.metadata.dst_node_id].receive(m) for m in delivered]
        if Key.MASKED_PARAMETERS in _configs(replies[0]):
            self._arrive(replies)
        self.seconds += time.perf_counter() - start
        return replies

    def _is_there(self, message: Message) -> bool:
        early = _configs(message).get(Key.STAGE) in (Stage.SETUP, Stage.SHARE_KEYS)
        return early or message.metadata.dst_node_id not in self._lost

    def _arrive(self, replies: list[Message]) -> None:
        """Copy the masked updates, as a network does: the copies are the server's memory."""
        self._sent = [_configs(reply)[Key.MASKED_PARAMETERS] for reply in replies]
        self.upload_bytes = sum(len(part) for part in self._sent[0])
        self.memory.start()
        for reply, parts in zip(replies, self._sent, strict=True):
            _configs(reply)[Key.MASKED_PARAMETERS] = [bytes(bytearray(part)) for part in parts]


def _configs(message: Message) -> ConfigRecord:
    return message.content.config_records[RECORD_KEY_CONFIGS]


def _copy(message: Message) -> Message:
    """Give a message records of its own: the workflow sends one to all, and the mod changes it."""
    received = copy(message)
    received.content = RecordDict(dict(message.content))
    received.content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord(dict(_configs(message)))
    return received


class FreeStrategy(FedAvg):
    """Takes every client and keeps the first result, which holds the mean already."""

    def __init__(self, clients: Iterable[Client]) -> None:
        super().__init__()
        self._clients = list(clients)

    def configure_fit(self, server_round, parameters, client_manager):  # noqa: ARG002 - Flower's
        """Invite everyone; of a proxy the workflow uses the node's number alone."""
        return [(client, FitIns(parameters, {})) for client in self._clients]

    def aggregate_fit(self, server_round, results, failures):  # noqa: ARG002 - Flower's
        """Give the mean."""
        return results[0][1].parameters, {}


def run(case: Case) -> Measurement:
    """Take one round through all stages.

    Raises:
        RuntimeError: Flower gave the round up.
    """
    clients = {device + 1: Client(case, device) for device in range(case.num_devices)}
    surviving = {device + 1 for device in survivors(case)}
    grid = InProcessGrid(clients, clients.keys() - surviving)
    context = _context(case, clients.values())
    workflow = SecAggPlusWorkflow(
        case.num_neighbours + 1, case.threshold, max_weight=float(MAX_WEIGHT)
    )
    state, server_s = WorkflowState(), []
    for stage in (
        workflow.setup_stage,
        workflow.share_keys_stage,
        workflow.collect_masked_vectors_stage,
        workflow.unmask_stage,
    ):
        grid.seconds, start = 0.0, time.perf_counter()
        if not stage(grid, context, state):
            raise RuntimeError(f"Flower gave up in {stage.__name__}")
        server_s.append(time.perf_counter() - start - grid.seconds)
    peak_bytes = grid.memory.stop()
    mean = parameters_to_ndarrays(
        arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    )[0]
    took = [clients[node_id].seconds for node_id in surviving]
    return Measurement(
        device_s=median(
            one["setup"] + one["share_keys"] + one["collect_masked_vectors"] for one in took
        ),
        finish_s=median(one["unmask"] for one in took),
        sum_s=server_s[2],
        unmask_s=server_s[3],
        upload_bytes=grid.upload_bytes,
        server_peak_bytes=peak_bytes,
        max_error=float(np.abs(mean - exact_mean(case)).max()),
    )


def _context(case: Case, clients: Iterable[Client]) -> LegacyContext:
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.zeros(case.num_values, np.float32)])
    state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(start, keep_input=True)
    return LegacyContext(
        Context(1, 1, {}, state, {}),
        strategy=FreeStrategy(clients),
        client_manager=SimpleClientManager(),
    )


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    answer_requests(lambda request: asdict(run(Case(**request))))
