"""A Flower app as what a device runs to learn: the adapter to `minga.federation.trainer`.

The app is one of the following, unchanged, named `module:attribute`:

- a `ClientApp`, with functions `@app.train()` and `@app.evaluate()` or made of a `client_fn`, with
  its mods and its lifespan;
- a class derived from `NumPyClient` or `Client`, made once, or an object of one;
- a function that makes a client of a `Context`.

It runs in the device's training process. The update is what it returns minus what it was given.
Context and its `state` live as long as that process.
"""

import importlib
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateIns,
    FitIns,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from numpy.typing import NDArray

from minga.federation.errors import TrainerError
from minga.federation.flower import folder
from minga.federation.flower.arrays import ArrayNames, without_names
from minga.federation.flower.runtime import (
    COORDINATOR_NODE_ID,
    RUN_ID,
    be_a_node,
    has_client_fn,
    legacy,
    node_id_of,
)
from minga.federation.parameters import Parameters
from minga.federation.trainer import Scalar, TrainingConfig, Update

ARRAYS: Final = "arrays"
CONFIG: Final = "config"
NUM_EXAMPLES: Final = "num-examples"
"""What Flower's own strategies call their records, unless told otherwise."""


class FlowerTrainer:
    """Trains and evaluates with a Flower app; made by `from_options`.

    Args:
        app: the app.
        node_config: this device's `Context.node_config`, such as `partition-id`.
        run_config: `Context.run_config`; a campaign's training configuration overrides what of it
            has the same name.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        node_config: Mapping[str, Scalar],
        run_config: Mapping[str, Scalar],
    ) -> None:
        self._app = app
        self._run_config = dict(run_config)
        self._node_id = node_id_of(repr(sorted(node_config.items())))
        self._context = Context(
            run_id=RUN_ID,
            node_id=self._node_id,
            node_config=dict(node_config),
            state=RecordDict(),
            run_config=dict(run_config),
        )

    def fit(self, parameters: Parameters, config: TrainingConfig) -> Update:
        """Train from `parameters` and give the difference.

        Raises:
            TrainerError: the app says that it failed.
            ValueError: what it gives is no update of this model.
        """
        names = ArrayNames.of(parameters, config)
        content = self._ask(MessageType.TRAIN, names, names.pick(parameters), config)
        if has_client_fn(self._app):
            result = legacy.recorddict_to_fitres(content, keep_input=False)
            _require_ok(result.status)
            returned = parameters_to_ndarrays(result.parameters)
            num_examples, metrics = result.num_examples, result.metrics
        else:
            returned = _arrays_of(content, names)
            num_examples, metrics = _counted(content)
        return Update(
            delta=names.delta(parameters, returned),
            num_examples=int(num_examples),
            metrics=_numbers(metrics),
        )

    def evaluate(self, parameters: Parameters, config: TrainingConfig) -> Mapping[str, float]:
        """Measure `parameters`; a client's loss is among the metrics as `loss`.

        Raises:
            TrainerError: the app says that it failed.
            ValueError: what it gives is no evaluation.
        """
        names = ArrayNames.of(parameters, config)
        content = self._ask(MessageType.EVALUATE, names, names.pick(parameters), config)
        if has_client_fn(self._app):
            result = legacy.recorddict_to_evaluateres(content)
            _require_ok(result.status)
            return {"loss": float(result.loss), **_numbers(result.metrics)}
        return _numbers(_counted(content)[1])

    def _ask(
        self,
        kind: str,
        names: ArrayNames,
        arrays: list[NDArray[np.float32]],
        config: TrainingConfig,
    ) -> RecordDict:
        """Send the app one message and give the reply's content."""
        be_a_node(COORDINATOR_NODE_ID)  # which the message says that it comes from
        shown = without_names(config)
        self._context.run_config = {
            **self._run_config,
            **{name: value for name, value in shown.items() if name in self._run_config},
        }
        message = Message(
            self._records(kind, names, arrays, shown),
            dst_node_id=self._node_id,
            message_type=kind,
        )
        reply = self._app(message, self._context)
        if not isinstance(reply, Message):
            raise ValueError(f"the Flower app replied with a {type(reply).__name__}, no Message")
        if reply.has_error():
            raise TrainerError(f"the Flower app replied with error {reply.error.code}")
        return reply.content

    def _records(
        self,
        kind: str,
        names: ArrayNames,
        arrays: list[NDArray[np.float32]],
        config: dict[str, Scalar],
    ) -> RecordDict:
        if not has_client_fn(self._app):
            named = zip(names.theirs, arrays, strict=True)
            record = ArrayRecord({name: Array(array) for name, array in named})
            return RecordDict({ARRAYS: record, CONFIG: ConfigRecord(dict(config))})
        tensors = ndarrays_to_parameters(arrays)
        if kind == MessageType.TRAIN:
            return legacy.fitins_to_recorddict(FitIns(tensors, dict(config)), keep_input=False)
        return legacy.evaluateins_to_recorddict(
            EvaluateIns(tensors, dict(config)), keep_input=False
        )


def from_options(options: Mapping[str, Scalar]) -> FlowerTrainer:
    """Make the trainer of a device from its options.

    Args:
        options: `project`, the folder of the app; `client_app`, `module:attribute` in it, if the
            folder does not say which; `source`, this site's data, if it has any to name. All but
            the first two become `Context.node_config`, texts that are numbers or truth values as
            such: `partition-id` of "3" is 3.

    Raises:
        TrainerError: no app is named, or it cannot be loaded; see also `folder`.
    """
    project = Path(str(options.get(folder.PROJECT, "."))).absolute()
    reference = str(options.get(folder.CLIENT_APP) or folder.client_app_of(project))
    if not reference:
        raise TrainerError(
            f"{project} names no Flower app; add to its minga.toml: "
            '[federation.flower] client_app = "client_app:app"'
        )
    node_config = {
        name: _typed(value)
        for name, value in options.items()
        if name not in (folder.PROJECT, folder.CLIENT_APP)
    }
    app = _load(project, reference, node_config)
    return FlowerTrainer(app, node_config=node_config, run_config=folder.run_config_of(project))


def _load(project: Path, reference: str, node_config: Mapping[str, Scalar]) -> ClientApp:
    """Import what is named and make it a ClientApp."""
    module_name, _, attribute = reference.partition(":")
    sys.path.insert(0, str(project))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainerError(f"the Flower app {reference!r} cannot be loaded: {error}") from error
    if isinstance(found, ClientApp):
        return found
    if isinstance(found, type) and issubclass(found, Client | NumPyClient):
        found = found(**_arguments(found, node_config))
    if isinstance(found, Client | NumPyClient):
        client = found.to_client()

        def client_fn(context: Context) -> Client:  # noqa: ARG001 - Flower's signature
            return client

        return ClientApp(client_fn)
    if callable(found):
        return ClientApp(found)
    raise TrainerError(
        f"the Flower app {reference!r} is of type {type(found).__name__}; name a ClientApp, "
        "a class derived from NumPyClient or Client, or a client_fn"
    )


def _arguments(make: Callable[..., Any], node_config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Give a client's constructor what it asks for by name: `partition_id` of `partition-id`."""
    given = {name.replace("-", "_"): value for name, value in node_config.items()}
    wanted = inspect.signature(make).parameters.values()
    missing = [
        argument.name
        for argument in wanted
        if argument.name not in given
        and argument.default is argument.empty
        and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    ]
    if missing:
        raise TrainerError(
            f"{getattr(make, '__name__', make)} needs {', '.join(missing)}; "
            f"start the device with --option.{missing[0].replace('_', '-')} VALUE"
        )
    return {argument.name: given[argument.name] for argument in wanted if argument.name in given}


def _typed(value: Scalar) -> Scalar:
    """Read a command line's text as Flower reads `--node-config`: as TOML where it is a scalar."""
    if not isinstance(value, str):
        return value
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return value
    return read if isinstance(read, bool | int | float | str) else value


def _arrays_of(content: RecordDict, names: ArrayNames) -> list[NDArray[Any]]:
    """Read the reply's one ArrayRecord, by name, in whatever order it is."""
    record = _only(content.array_records, "ArrayRecord")
    if set(record) != set(names.theirs):
        raise ValueError(
            f"the app returned the arrays {', '.join(record)}; "
            f"it was given {', '.join(names.theirs)}"
        )
    return [record[name].numpy() for name in names.theirs]


def _counted(content: RecordDict) -> tuple[float, Mapping[str, Any]]:
    """Read the reply's one MetricRecord: the count of examples, and what else it measures."""
    metrics: dict[str, Any] = dict(_only(content.metric_records, "MetricRecord"))
    num_examples = metrics.pop(NUM_EXAMPLES, None)
    if not isinstance(num_examples, int | float):
        raise ValueError(f"the app's MetricRecord has no {NUM_EXAMPLES!r}")
    return num_examples, metrics


def _only(records: Mapping[str, Any], kind: str) -> Any:
    if len(records) != 1:
        raise ValueError(f"the app replied with {len(records)} records of kind {kind}, not one")
    return next(iter(records.values()))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Keep what is one number: the wire and the registry know no other metric."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _require_ok(status: Status) -> None:
    if status.code != Code.OK:
        raise TrainerError(f"the Flower client says {status.code.name}: {status.message}")
