"""The researcher's side: a Task, its data, and how it is loaded from a project's file.

Importing this module loads neither torch nor Ray; a Task's own file usually loads torch.
"""

import copy
import hashlib
import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from minga.training.errors import DataError, TaskError
from minga.training.space import (
    Choice,
    Domain,
    LogUniform,
    Maximize,
    Minimize,
    Objective,
    Params,
    RandInt,
    Uniform,
)
from minga.training.stored import StoredRows

if TYPE_CHECKING:
    import torch

    from minga.training.schema import Schema
    from minga.training.selection.contenders import Contender

NAME = r"[a-z0-9]+(-[a-z0-9]+)*"
"""What models and their kinds may be called."""

SQLITE = "sqlite:///"
"""What follows is the path of a database; a second slash makes it absolute."""

SplitName = Literal["train", "validation", "test"]

Folds = Literal["shuffled", "grouped", "ordered"]

OutputKind = Literal["number", "category"]


class Batch(NamedTuple):
    """The examples of one training step, first axis the batch; `weights` if they count unalike."""

    inputs: "torch.Tensor"
    targets: "torch.Tensor"
    weights: "torch.Tensor | None" = None

    def each(self, change: "Callable[[torch.Tensor], torch.Tensor]") -> "Batch":
        """Change each of the tensors."""
        weights = None if self.weights is None else change(self.weights)
        return Batch(change(self.inputs), change(self.targets), weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Examples: `inputs` of shape `(n, ...)` and `targets` of shape `(n, ...)`.

    Float arrays of another width become float32, the only width that networks compute in here.
    Inputs may stay on the disk (`minga.training.stored.StoredRows`).
    `owners`, shape `(n,)`, says whose each example is: simulations give each owner a device, and
    cross-validation with `Task.folds = "grouped"` keeps an owner's examples together.

    Raises:
        DataError: they differ in length, or inputs are not numbers.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    owners: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            given = getattr(self, name)
            if isinstance(given, StoredRows) and name == "inputs" and given.dtype != np.float64:
                continue
            array = np.asarray(given)
            if array.ndim == 0 or array.dtype.kind not in "fiub":
                raise DataError(
                    f"{name} are {array.dtype} of shape {array.shape}; "
                    "give an array of numbers whose first axis counts the examples"
                )
            if array.dtype.kind == "f":
                array = array.astype(np.float32, copy=False)
            object.__setattr__(self, name, array)
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"{len(self.inputs)} inputs but {len(self.targets)} targets; "
                "each example needs one of each"
            )
        if self.owners is not None and np.shape(self.owners) != (len(self.inputs),):
            raise DataError(
                f"owners have shape {np.shape(self.owners)}; give one for each of "
                f"{len(self.inputs)} examples"
            )

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The examples to learn from, to choose by, and to judge by."""

    train: Split
    validation: Split
    test: Split

    def __getitem__(self, name: SplitName) -> Split:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class Task(ABC):
    """What is learned from which data, with which model, and how it is judged.

    One Task runs unchanged in search, in distributed training and on devices.

    Attributes:
        name: the registered model's name: lower-case letters, digits and dashes.
        defaults: hyper-parameters used where nothing was searched. `lr`, `batch_size`,
            `max_grad_norm`, `accumulate`, `schedule`, `warmup` and `class_weights` are understood
            by the defaults of this class and by the training loop.
        search_space: domains of the hyper-parameters to search; each has a default.
        objective: the metric that search, checkpoints and gates go by.
        columns: names of the inputs' columns, for messages and profiles.
        categories: column -> the values that it may have, in an order that never changes. Texts
            stand for the numbers 0, 1, 2 and so on.
        folds: how `minga run --auto` divides examples: `shuffled`, `grouped` by their owners, or
            `ordered` by time as they stand; see `minga.training.selection.folds`.
        outputs: names of the columns of the model's outputs, for the monitor, and whether each is a
            number, or a category: 0, 1, 2 and so on, whose shares are watched.
    """

    name: ClassVar[str]
    defaults: ClassVar[Params] = {}
    search_space: ClassVar[Mapping[str, Domain]] = {}
    objective: ClassVar[Objective]
    columns: ClassVar[tuple[str, ...]] = ()
    categories: ClassVar[Mapping[str, tuple[str | float, ...]]] = {}
    folds: ClassVar[Folds] = "shuffled"
    outputs: ClassVar[Mapping[str, OutputKind]] = {}

    @abstractmethod
    def data(self, source: str) -> Splits:
        """Read the examples behind `source`; the same source gives the same splits."""

    @abstractmethod
    def model(self, params: Params) -> "torch.nn.Module":
        """Build the model, untrained; it gets inputs that `preparation` has prepared."""

    @abstractmethod
    def loss(self, outputs: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        """Give the mean loss over a batch, a scalar."""

    @abstractmethod
    def metrics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> Mapping[str, float]:
        """Judge the model's raw outputs; the objective's metric must be among the names."""

    def preparation(self, train: Split) -> "torch.nn.Module":
        """Build the network's first part, fitted on the training split.

        It is exported and federated with the model, so that training, serving and devices
        prepare inputs alike. The default puts means in place of missing values, standardises float
        inputs of shape `(n, columns)`, and makes columns of 0 and 1 of declared `categories`.
        """
        from minga.training.preparation import default_preparation

        return default_preparation(train, self.columns, self.categories)

    @property
    def width(self) -> int:
        """How many columns the default preparation makes of `columns` and `categories`."""
        from minga.training.schema import prepared_width

        return prepared_width(self.columns, self.categories)

    def optimiser(self, model: "torch.nn.Module", params: Params) -> "torch.optim.Optimizer":
        """Build the optimiser; Adam at `lr` (0.001) unless overridden."""
        import torch

        return torch.optim.Adam(model.parameters(), lr=float(params.get("lr", 1e-3)))

    def schedule(
        self, optimiser: "torch.optim.Optimizer", params: Params, num_steps: int
    ) -> "torch.optim.lr_scheduler.LRScheduler | None":
        """Build what moves the learning rate after each step; see `minga.training.schedules`."""
        from minga.training.schedules import schedule_of

        return schedule_of(optimiser, params, num_steps)

    def step(self, model: "torch.nn.Module", batch: Batch) -> "torch.Tensor":
        """Give the loss of one training step; the loop does the rest."""
        outputs = model(batch.inputs)
        if batch.weights is None:
            return self.loss(outputs, batch.targets)
        from minga.training.weighting import weighted_loss

        return weighted_loss(self.loss, outputs, batch.targets, batch.weights)

    def begin(self, network: "torch.nn.Module", train: Split, *, seed: int) -> None:  # noqa: B027
        """Set what first weights take from the training split, such as the centres of clusters.

        Nothing unless overridden. It must give the same each time that it is called; its
        `network` is a preparation and a model, called so.
        """

    def finish(self, network: "torch.nn.Module", validation: Split) -> None:  # noqa: B027
        """Set what is chosen on the validation split once training is over, such as a threshold.

        Nothing unless overridden. It must give the same each time that it is called.
        """

    def contenders(self) -> "Sequence[Contender]":
        """Give other models for `minga run --auto` to compare with `model`: none unless overridden.

        Anything that exports to ONNX can be one; see `minga.training.selection.contenders`.
        """
        return ()

    def with_defaults(self, more: Params) -> Self:
        """Give this Task with more, or other, hyper-parameters among its defaults."""
        changed = copy.copy(self)
        vars(changed)["defaults"] = {**self.defaults, **more}
        return changed

    def slices(self, split: Split) -> Mapping[str, NDArray[np.bool_]]:
        """Name parts of a split, as masks of shape `(n,)`, on which the model must not fail.

        Unless overridden they are the groups.
        """
        return {
            f"{attribute}={group}": np.asarray(labels) == group
            for attribute, labels in self.groups(split).items()
            for group in np.unique(labels)
        }

    def groups(self, split: Split) -> Mapping[str, NDArray[Any]]:  # noqa: ARG002
        """Name attributes by which examples must not be treated unequally.

        Each has every example's group, shape `(n,)`. A classifier that gives `probabilities` is
        measured on them; see `max_selection_gap` and `max_odds_gap` in `[gates]`.
        """
        return {}

    def probabilities(self, outputs: NDArray[Any]) -> NDArray[Any] | None:  # noqa: ARG002
        """Turn a classifier's raw outputs into probabilities, so that its calibration is judged.

        Give shape `(n,)` for the positive class of two, or `(n, classes)`; None, as here, if the
        outputs are none.
        """
        return None

    def schema(self, train: Split) -> "Schema":
        """Describe valid data; inferred from the training split unless overridden."""
        from minga.training.schema import infer_schema

        return infer_schema(train, self.columns, self.categories)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReference:
    """Where a Task is, so that another process can load it; the class itself does not travel.

    Attributes:
        root: the project folder, absolute.
        name: `file.py:Class`, the file relative to `root`.
    """

    root: Path
    name: str

    @property
    def file(self) -> Path:
        """The Task's file."""
        return self.root / self.name.partition(":")[0]

    def load(self) -> Task:
        """Load the file and make the Task; see `load_task`."""
        return load_task(self.name, self.root)

    def resolve(self, source: str) -> str:
        """Take a relative path from the project folder; leave URIs and absolute paths alone."""
        if source.startswith(SQLITE) and not source.startswith(SQLITE + "/"):
            return f"{SQLITE}{self.root}/{source.removeprefix(SQLITE)}"
        return source if "://" in source else str(self.root / source)


def load_task(reference: str, root: Path) -> Task:
    """Load a Task by reference and make one.

    The Task's folder is appended to `sys.path`, so that it may import files beside it.

    Args:
        reference: `file.py:Class`, the file relative to `root`.
        root: the project folder.

    Raises:
        TaskError: no such file or class, the file does not import, or the class is no usable Task.
    """
    file, _, name = reference.partition(":")
    if not file or not name:
        raise TaskError(f'task = "{reference}" is not of the form "task.py:Class"')
    module = _load_module((root / file).resolve(), reference)
    kind = getattr(module, name, None)
    if kind is None:
        raise TaskError(f"{file} has no class {name!r}; {_known_tasks(module)}")
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise TaskError(f"{reference} is not a Task; derive it: class {name}(minga.training.Task)")
    _check_class(kind, reference)
    return kind()


def _load_module(path: Path, reference: str) -> ModuleType:
    if not path.is_file():
        raise TaskError(f'task = "{reference}": there is no file {path}')
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"minga_task_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise TaskError(
            f"{path.name} does not import: {type(error).__name__}: {error}; "
            f"try it with: python {path}"
        ) from error
    return module


def _known_tasks(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Task) and value is not Task
    ]
    if not names:
        return "it has no Task at all; derive one from minga.training.Task"
    return f"it has {', '.join(sorted(names))}"


def _check_class(kind: type[Task], reference: str) -> None:
    missing = sorted(kind.__abstractmethods__) + [
        name for name in ("name", "objective") if not hasattr(kind, name)
    ]
    if missing:
        raise TaskError(f"{reference} lacks {', '.join(missing)}; every Task defines them")
    if not isinstance(kind.name, str) or not re.fullmatch(NAME, kind.name):
        raise TaskError(
            f"{reference}: name is {kind.name!r}; use lower-case letters, digits and dashes"
        )
    if not isinstance(kind.objective, Maximize | Minimize):
        raise TaskError(
            f'{reference}: objective is {kind.objective!r}; use Maximize("metric") or Minimize'
        )
    _check_params(kind, reference)


def _check_params(kind: type[Task], reference: str) -> None:
    for name, value in kind.defaults.items():
        if not isinstance(value, bool | int | float | str):
            raise TaskError(
                f"{reference}: default {name} is {value!r}; use a bool, a number or a string"
            )
    for name, domain in kind.search_space.items():
        if not isinstance(domain, Choice | Uniform | LogUniform | RandInt):
            raise TaskError(
                f"{reference}: search_space {name} is {domain!r}; "
                "use choice, uniform, loguniform or randint"
            )
        if name not in kind.defaults:
            raise TaskError(f"{reference}: {name} is searched but has no value in defaults")
