"""A Task as what a device runs to learn: the adapter to `minga.federation.trainer`."""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from minga.federation.flower.arrays import without_names
from minga.federation.parameters import Parameters
from minga.federation.trainer import (
    NUM_EXAMPLES,
    Scalar,
    TrainingConfig,
    Update,
    proximal_mu,
)
from minga.training.config import DataConfig
from minga.training.data import check, read_splits
from minga.training.data.checks import require_none
from minga.training.errors import TaskError
from minga.training.evaluate import evaluate
from minga.training.loop import Learner, fit
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.proximal import Pull
from minga.training.scaffold import Correction
from minga.training.schema import iterate_columns, read_schema
from minga.training.space import Params
from minga.training.task import Splits, Task, TaskReference


class TaskTrainer:
    """Trains a Task on this site's data, with the same loop as everywhere.

    The coordinator's configuration overrides the Task's defaults; `epochs` (1), `seed` (0) and
    `proximal_mu` (0, see `minga.training.proximal`) are read from it too. The same parameters, data
    and configuration give the same update.
    """

    def __init__(self, task: Task, splits: Splits) -> None:
        self._task = task
        self._splits = splits

    @property
    def num_examples(self) -> int:
        """How many examples this site trains on."""
        return len(self._splits.train)

    def fit(self, parameters: Parameters, config: TrainingConfig) -> Update:
        """Train from `parameters` and give the difference.

        Raises:
            ShapeError: the parameters are not of this Task's network.
            DivergedError: the loss is no longer a finite number.
            ValueError: `proximal_mu` is no number from 0 on.
        """
        return self._fit(parameters, config, None)

    def fit_corrected(
        self, parameters: Parameters, config: TrainingConfig, correction: Parameters
    ) -> Update:
        """Train with a correction of each step's gradient (see `minga.training.scaffold`).

        Raises:
            Exception: as `fit` does.
        """
        return self._fit(parameters, config, correction)

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Give columns of the inputs that this site trains on, as queries ask for them."""
        return {
            name: np.asarray(values, np.float64)
            for name, values in iterate_columns(self._splits.train.inputs, self._task.columns)
            if name in names and np.issubdtype(values.dtype, np.number)
        }

    def initial(self, config: TrainingConfig) -> Parameters:
        """Give the untrained parameters of this Task's network, prepared for this site's data."""
        params = self._params(config)
        seed = int(config.get("seed", 0))
        return parameters_of(build_network(self._task, params, self._splits.train, seed=seed))

    def _fit(
        self, parameters: Parameters, config: TrainingConfig, correction: Parameters | None
    ) -> Update:
        params = self._params(config)
        network = self._network(parameters, params)
        mu = proximal_mu(config)
        corrected = Correction(network, correction) if correction is not None else None
        hooks = [corrected] if corrected else []
        history = fit(
            Learner(self._task, network, params),
            self._splits.train,
            epochs=int(config.get("epochs", 1)),
            seed=int(config.get("seed", 0)),
            on_gradient=_all([*hooks, *([Pull(network, mu)] if mu > 0 else [])]),
        )
        return Update(
            delta={
                name: value - parameters[name] for name, value in parameters_of(network).items()
            },
            num_examples=len(self._splits.train),
            metrics={"train_loss": history[-1]["train_loss"]},
            gradient=corrected.mean_gradient() if corrected else None,
        )

    def evaluate(self, parameters: Parameters, config: TrainingConfig) -> Mapping[str, float]:
        """Measure `parameters` on this site's validation split; what has no value is left out.

        Raises:
            ShapeError: the parameters are not of this Task's network.
        """
        network = self._network(parameters, self._params(config))
        metrics = evaluate(self._task, network, self._splits.validation)
        measured = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return {**measured, NUM_EXAMPLES: len(self._splits.validation)}

    def _params(self, config: TrainingConfig) -> Params:
        return {**self._task.defaults, **without_names(config)}

    def _network(self, parameters: Parameters, params: Params) -> nn.Module:
        network = build_network(
            self._task, params, self._splits.train, seed=int(params.get("seed", 0))
        )
        load_parameters(network, parameters)
        return network


def _all(hooks: Sequence[Callable[[], None]]) -> Callable[[], None] | None:
    """Make one hook of several, called in their order."""

    def call() -> None:
        for hook in hooks:
            hook()

    return call if hooks else None


def trainer_from_options(options: Mapping[str, Scalar]) -> TaskTrainer:
    """Make the trainer of a device from its options.

    Args:
        options: `project`, the folder with `minga.toml` and the Task's file, and `source`, this
            site's data, a relative path taken from that folder.

    Raises:
        TaskError: an option is missing, or the project's Task cannot be used.
        DataError: the Task cannot read the source.
        SchemaError: the data breaks the schema that the project keeps.
    """
    missing = [name for name in ("project", "source") if name not in options]
    if missing:
        raise TaskError(
            f"the trainer's options lack {' and '.join(missing)}; give project, the folder with "
            "minga.toml, and source, this site's data"
        )
    root = Path(str(options["project"])).absolute()
    reference = TaskReference(root=root, name=_task_name(root / "minga.toml"))
    task = reference.load()
    source = reference.resolve(str(options["source"]))
    splits = read_splits(task, source)
    _require_schema(root / "schema.json", source, splits)
    return TaskTrainer(task, splits)


def _require_schema(file: Path, source: str, splits: Splits) -> None:
    """Check this site's data against the schema that the project keeps, if it keeps one."""
    if file.exists():
        found = check(splits, read_schema(file), None, DataConfig(source=source))
        errors = tuple(violation for violation in found if violation.severity == "error")
        require_none(source, errors, "its project keeps another schema.json")


def _task_name(file: Path) -> str:
    """Read only which Task it is: the rest of the project's settings is not a device's."""
    try:
        name = tomllib.loads(file.read_text(encoding="utf-8")).get("task")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise TaskError(
            f"{file} cannot be read: {error}; copy the project to this device"
        ) from error
    if not isinstance(name, str):
        raise TaskError(f'{file} has no task; add: task = "task.py:Class"')
    return name
