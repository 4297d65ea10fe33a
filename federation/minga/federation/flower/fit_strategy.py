"""Strategies of `flwr.server.strategy`: FitIns to the devices, FitRes from them."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from numpy.typing import NDArray

from minga.federation.errors import StrategyError
from minga.federation.flower.runtime import node_id_of
from minga.federation.flower.strategy import Arrays, Instructions, Returned
from minga.federation.trainer import Scalar

_AVERAGING = {kind.aggregate_fit for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)}


class FitKind:
    """An older strategy at work.

    Args:
        strategy: the strategy.
        is_new: it has not taken a step yet, in this process or before.
    """

    def __init__(self, strategy: Strategy, *, is_new: bool) -> None:
        self.strategy: Strategy = strategy
        self._is_new = is_new

    @property
    def only_averages(self) -> bool:
        """True if the step is one of Flower's own that average."""
        return type(self.strategy).aggregate_fit in _AVERAGING

    def configure(
        self,
        number: int,
        arrays: Mapping[str, NDArray[np.float32]],
        config: dict[str, Scalar],
        devices: Sequence[str],
    ) -> Instructions:
        """Ask `configure_fit`; all devices must be told the same."""
        clients = _Clients()
        for device in devices:
            clients.register(_Client(device))
        parameters = ndarrays_to_parameters(list(arrays.values()))
        self._initialise(parameters, clients)
        told = self.strategy.configure_fit(number, parameters, clients)
        for _, instruction in told:
            if instruction.config != told[0][1].config:
                raise StrategyError("it tells devices different things; a round has one training")
            _require_model(instruction, parameters)
        return Instructions(
            training={**config, **_scalars(told[0][1].config if told else {})},
            devices=tuple(client.cid for client, _ in told),
        )

    def _initialise(self, parameters: Parameters, clients: SimpleClientManager) -> None:
        """Let the strategy say where it starts, once, as Flower's server does."""
        if not self._is_new:
            return
        self._is_new = False
        start = self.strategy.initialize_parameters(clients)
        if start is not None and start.tensors != parameters.tensors:
            raise StrategyError(
                "it starts from parameters of its own; start the campaign from them, since devices "
                "and registry know the campaign's"
            )

    def aggregate(
        self, number: int, results: Sequence[Returned], failures: Mapping[str, str]
    ) -> tuple[Arrays | None, dict[str, Scalar]]:
        """Ask `aggregate_fit`, then `evaluate`, which measures on the coordinator if anything."""
        told: list[tuple[ClientProxy, FitRes]] = [
            (
                _Client(result.name),
                FitRes(
                    status=Status(code=Code.OK, message="Success"),
                    parameters=ndarrays_to_parameters(result.arrays),
                    num_examples=result.num_examples,
                    metrics=dict(result.metrics),
                ),
            )
            for result in results
        ]
        lost = [ConnectionError(f"{device}: {reason}") for device, reason in failures.items()]
        parameters, metrics = self.strategy.aggregate_fit(number, told, lost)
        if parameters is None:
            return None, {}
        evaluation = self.strategy.evaluate(number, parameters)
        if evaluation is not None:
            loss, more = evaluation
            metrics = {**metrics, "loss": loss, **more}
        return parameters_to_ndarrays(parameters), dict(metrics)


class _Clients(SimpleClientManager):  # type: ignore[misc] # flwr counts as untyped here
    """The devices that a round may invite; nobody is waited for, or the round would stand still."""

    def wait_for(self, num_clients: int, timeout: int = 0) -> bool:  # noqa: ARG002 - Flower's
        if num_clients > len(self.clients):
            raise StrategyError(
                f"it waits for {num_clients} clients, the cohort has {len(self.clients)}; lower "
                "min_available_clients in [federation.flower.arguments], or raise the cohort"
            )
        return True


class _Client(ClientProxy):  # type: ignore[misc] # as above
    """A device by name: strategies choose devices, they do not call them."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.node_id = node_id_of(device)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StrategyError("it calls a device by itself; only rounds reach devices")

    get_properties = get_parameters = fit = evaluate = reconnect = _refuse


def _require_model(instruction: FitIns, parameters: Parameters) -> None:
    given = instruction.parameters
    if given is not parameters and given.tensors != parameters.tensors:
        raise StrategyError("it sends devices other parameters than the global model's")


def _scalars(config: Mapping[str, object]) -> dict[str, Scalar]:
    for name, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise StrategyError(
                f"it tells devices {name} = a {type(value).__name__}; a training configuration "
                "holds texts, numbers and truth values"
            )
    return dict(config)  # type: ignore[arg-type]
