"""Strategies of `flwr.serverapp.strategy`: messages to the devices and from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from numpy.typing import NDArray

from minga.federation.errors import StrategyError
from minga.federation.flower.runtime import COORDINATOR_NODE_ID, be_a_node, node_id_of
from minga.federation.flower.strategy import Arrays, Instructions, Returned
from minga.federation.trainer import Scalar

_AVERAGING = {kind.aggregate_train for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)}

_MAX_QUESTIONS: Final = 3
"""How often a strategy may ask who is there: one that waits for more asks each second, for ever."""

_LOST: Final = 0
"""Code of the error message that stands for a device from which nothing came."""


class TrainKind:
    """A newer strategy at work."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy: Strategy = strategy
        self._names: tuple[str, ...] = ()

    @property
    def only_averages(self) -> bool:
        """True if the step is one of Flower's own that average."""
        return type(self.strategy).aggregate_train in _AVERAGING

    def configure(
        self,
        number: int,
        arrays: Mapping[str, NDArray[np.float32]],
        config: dict[str, Scalar],
        devices: Sequence[str],
    ) -> Instructions:
        """Ask `configure_train`; all devices must be told the same."""
        be_a_node(COORDINATOR_NODE_ID)
        self._names = tuple(arrays)
        record = _record(arrays)
        by_node = {node_id_of(device): device for device in devices}
        grid = _Cohort(by_node)
        messages = list(
            self.strategy.configure_train(number, record, ConfigRecord(dict(config)), grid)
        )
        told = [_config_of(message) for message in messages]
        if any(one != told[0] for one in told):
            raise StrategyError("it tells devices different things; a round has one training")
        for message in messages:
            _require_model(message, record)
        return Instructions(
            training={**config, **(told[0] if told else {})},
            devices=tuple(by_node[message.metadata.dst_node_id] for message in messages),
        )

    def aggregate(
        self, number: int, results: Sequence[Returned], failures: Mapping[str, str]
    ) -> tuple[Arrays | None, dict[str, Scalar]]:
        """Ask `aggregate_train`."""
        be_a_node(COORDINATOR_NODE_ID)
        weight = getattr(self.strategy, "weighted_by_key", "num-examples")
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": _record(dict(zip(self._names, result.arrays, strict=True))),
                        "metrics": MetricRecord({**result.metrics, weight: result.num_examples}),
                    }
                ),
                reply_to=_instruction(result.name),
            )
            for result in results
        ]
        replies += [
            Message(Error(_LOST, reason), reply_to=_instruction(device))
            for device, reason in failures.items()
        ]
        arrays, metrics = self.strategy.aggregate_train(number, replies)
        if arrays is None:
            return None, {}
        if set(arrays) != set(self._names):
            raise StrategyError(f"it made the arrays {', '.join(arrays)}")
        measured = {n: v for n, v in (metrics or {}).items() if not isinstance(v, list)}
        return [arrays[name].numpy() for name in self._names], measured


class _Cohort(Grid):  # type: ignore[misc] # flwr counts as untyped here
    """The devices that a round may invite; strategies choose them, they do not message them."""

    def __init__(self, node_ids: Iterable[int]) -> None:
        self._node_ids = tuple(node_ids)
        self._num_questions = 0

    def get_node_ids(self) -> Iterable[int]:
        self._num_questions += 1
        if self._num_questions > _MAX_QUESTIONS:
            raise StrategyError(
                f"it waits for more than the {len(self._node_ids)} devices of the cohort; lower "
                "min_available_nodes and min_train_nodes in [federation.flower.arguments], or "
                "raise the cohort"
            )
        return self._node_ids

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StrategyError("it messages devices by itself; only rounds reach devices")

    set_run = create_message = push_messages = pull_messages = send_and_receive = _refuse
    run = property(_refuse)


def _record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def _instruction(device: str) -> Message:
    """Make the message that a device's reply refers to."""
    return Message(RecordDict(), dst_node_id=node_id_of(device), message_type=MessageType.TRAIN)


def _config_of(message: Message) -> dict[str, Scalar]:
    config: dict[str, Scalar] = {}
    for record in message.content.config_records.values():
        for name, value in record.items():
            if not isinstance(value, bool | int | float | str):
                raise StrategyError(
                    f"it tells devices {name} = a {type(value).__name__}; a training configuration "
                    "holds texts, numbers and truth values"
                )
            config[name] = value
    return config


def _require_model(message: Message, record: ArrayRecord) -> None:
    given = list(message.content.array_records.values())
    if len(given) != 1 or (given[0] is not record and given[0] != record):
        raise StrategyError("it sends devices other arrays than the global model's")
