"""A project: a folder with `minga.toml` and the Task's file."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from minga.cluster.errors import ProjectError
from minga.cluster.response.config import RespondConfig
from minga.cluster.settings import Settings
from minga.federation.config import FederationConfig
from minga.serving.config import ServingConfig
from minga.training.approvals import Policy
from minga.training.config import (
    DataConfig,
    GateConfig,
    SearchConfig,
    SelectionConfig,
    TrainConfig,
)
from minga.training.data import digest_of, profile_of, read_splits
from minga.training.data.versions import DataVersion, require_version, versions_of
from minga.training.lineage import Code, code_of, code_tags
from minga.training.profile import Profile
from minga.training.progress import OnProgress, silent
from minga.training.schema import Schema
from minga.training.signing import Keyring
from minga.training.simulation.config import SimulationConfig
from minga.training.space import FEATURES
from minga.training.task import Splits, Task, TaskReference

if TYPE_CHECKING:
    from minga.training.data import DataReport
    from minga.training.registry import Registry
    from minga.training.tracking import Tracker

FILE = "minga.toml"
SCHEMA_FILE = "schema.json"
MONITOR_FOLDER = ".minga/monitor"


class Project(BaseModel):
    """The tables of `minga.toml`, and what they stand for.

    The Task and its data are loaded when they are first asked for, and kept.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    task: Annotated[str, Field(pattern=r"^[^:]+\.py:\w+$")]
    """The Task: `file.py:Class`, the file relative to the project folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides everything that is drawn: search, first weights, order of examples, resampling."""
    data: DataConfig
    search: SearchConfig = SearchConfig()
    selection: SelectionConfig = SelectionConfig()
    training: TrainConfig = TrainConfig()
    gates: GateConfig = GateConfig()
    serving: ServingConfig = Field(default_factory=lambda: ServingConfig.model_validate({}))
    federation: FederationConfig = FederationConfig()
    simulation: SimulationConfig = SimulationConfig()
    respond: RespondConfig = RespondConfig()

    _directory: Path = PrivateAttr()
    _checked: "DataReport | None" = PrivateAttr(default=None)

    @property
    def directory(self) -> Path:
        """The project folder, absolute."""
        return self._directory

    @property
    def work_folder(self) -> Path:
        """Where Minga keeps what it makes: the registry, unfinished work."""
        return self._directory / ".minga"

    @property
    def monitor_folder(self) -> Path:
        """Where the monitor keeps what it knows: `[serving.monitor] folder`, or the project's."""
        return self._directory / (self.serving.monitor.folder or MONITOR_FOLDER)

    @property
    def reference(self) -> TaskReference:
        """Where the Task is, for other processes."""
        return TaskReference(root=self._directory, name=self.task)

    @property
    def source(self) -> str:
        """What the Task's `data` gets."""
        return self.reference.resolve(self.data.source)

    @cached_property
    def loaded_task(self) -> Task:
        """The Task, with `[data] features` among its defaults.

        See `minga.training.task.load_task` for the errors.
        """
        task = self.reference.load()
        if not self.data.features:
            return task
        return task.with_defaults({FEATURES: ",".join(self.data.features)})

    @cached_property
    def splits(self) -> Splits:
        """The data of `[data] source`; refused if it is not the version that it should be."""
        _ = self.data_versions  # what was tampered with is refused before it is read
        return read_splits(self.loaded_task, self.source)

    @cached_property
    def data_digest(self) -> str:
        """The SHA-256 of all values; see `minga.training.data.digest_of`."""
        return digest_of(self.splits)

    @cached_property
    def data_schema(self) -> Schema:
        """What the Task says of valid data, or what its training split is like."""
        return self.loaded_task.schema(self.splits.train)

    @cached_property
    def data_profile(self) -> Profile:
        """The training split's statistics."""
        return profile_of(self.loaded_task, self.splits.train)

    @cached_property
    def data_versions(self) -> tuple[DataVersion, ...]:
        """The versions of the files behind the data; see `minga.training.data.versions`."""
        if self.data.sha256:
            require_version(self.source, self.data.sha256)
        return versions_of(self.source)

    @property
    def schema_file(self) -> Path:
        """Where the project keeps its schema, if it does: `minga data schema` writes it."""
        return self._directory / SCHEMA_FILE

    @property
    def keys_file(self) -> Path:
        """Where the API keys of what the project serves are, if there are any."""
        if self.serving.keys:
            return self._directory / self.serving.keys
        return self.work_folder / "keys.json"

    @property
    def protected_serving(self) -> ServingConfig:
        """How the project's models are served, with absolute names of files."""
        config = self.serving.anchored(self._directory)
        if not config.keys and self.keys_file.exists():
            return config.model_copy(update={"keys": str(self.keys_file.resolve())})
        return config

    @property
    def tracking_uri(self) -> str:
        """MLflow's database: MINGA_TRACKING_URI, or a file in the project."""
        return Settings().tracking_uri or f"sqlite:///{self.work_folder / 'mlflow.db'}"

    @property
    def artifact_root(self) -> str:
        """Where runs keep files: MINGA_ARTIFACT_ROOT, or a folder in the project."""
        return Settings().artifact_root or str(self.work_folder / "artifacts")

    @property
    def has_registry(self) -> bool:
        """Whether there may be a registry: False only if its SQLite file is not there yet."""
        file = self.tracking_uri.removeprefix("sqlite:///")
        return file == self.tracking_uri or Path(file).exists()

    def registry(self, on_progress: OnProgress = silent) -> "Registry":
        """Open the model registry; the database is made the first time."""
        from minga.training.registry import Registry  # noqa: PLC0415 - loads MLflow

        return Registry(
            self.tracking_uri,
            on_progress,
            keyring=lambda: self.keyring,
            approvals=Policy(needed=self.gates.approvals, approvers=self.gates.approvers),
        )

    @cached_property
    def keyring(self) -> Keyring:
        """The key that signs this machine's verdicts, made the first time, and the trusted ones."""
        return Keyring.open(self.signing_key_file, self.gates.trusted_keys)

    @property
    def signing_key_file(self) -> Path:
        """Where this machine's key is: MINGA_SIGNING_KEY, or a file in the project."""
        return Path(Settings().signing_key or self.work_folder / "signing.pem")

    def tracker(self, on_progress: OnProgress = silent) -> "Tracker":
        """Open the record of runs, in the experiment named after the Task."""
        from minga.training.tracking import Tracker  # noqa: PLC0415 - loads MLflow

        return Tracker.open(
            self.tracking_uri,
            self.artifact_root,
            self.loaded_task.name,
            on_progress,
            tags=code_tags(self.code),
        )

    @cached_property
    def code(self) -> Code:
        """The project's state in Git, when it was first asked for."""
        return code_of(self.reference)

    @property
    def tensorboard_folder(self) -> Path:
        """Where searches and trainings draw their curves: `tensorboard --logdir` shows them."""
        return Path(Settings().ray_storage or self.work_folder) / "tensorboard"

    @property
    def ray_storage(self) -> Path:
        """Where unfinished work is kept: MINGA_RAY_STORAGE, or a folder in the project."""
        return Path(Settings().ray_storage or self.work_folder / "ray")


def load(directory: Path | str = ".") -> Project:
    """Read a project's `minga.toml`.

    Raises:
        ProjectError: there is none, it is no TOML, or it holds what it should not; all that is
            wrong is said at once.
    """
    folder = Path(directory).absolute()
    file = folder / FILE
    if not file.is_file():
        raise ProjectError(
            f"no {FILE} in {folder}; go to a project folder, or make one with: minga init DIR"
        )
    try:
        project = Project.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProjectError(f"{file} is no TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(_explain(detail) for detail in error.errors())
        raise ProjectError(f"{file}: {problems}") from error
    project._directory = folder
    return project


def restore(settings: dict[str, Any], directory: Path, *, source: str) -> Project:
    """Make a project of recorded settings, as `Project.model_dump(mode="json")` gave them.

    Args:
        settings: of an earlier run.
        directory: the project folder.
        source: where that run's data is now.

    Raises:
        ProjectError: this version of Minga does not understand the settings.
    """
    settings = settings | {"data": settings["data"] | {"source": source}}
    try:
        project = Project.model_validate_json(json.dumps(settings))
    except ValidationError as error:
        problems = "; ".join(_explain(detail) for detail in error.errors())
        raise ProjectError(f"the recorded settings cannot be used: {problems}") from error
    project._directory = directory.absolute()
    return project


def _explain(detail: ErrorDetails) -> str:
    """Say what is wrong with one entry, where, and what to do."""
    path, models = _walk(detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = [name for model in models for name in model.model_fields]
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {path}; {advice}"
    if detail["type"] == "missing":
        return f"{path} is missing; add it"
    if detail["type"] == "union_tag_not_found":
        return f"{path}.name is missing; add one of {', '.join(map(_name_of, models))}"
    if detail["type"] == "union_tag_invalid":
        names = ", ".join(map(_name_of, models))
        return f"{path}.name should be one of {names}, not {detail['ctx']['tag']!r}"
    message = detail["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{path or 'the file'} {message}, not {detail['input']!r}"


def _walk(location: tuple[int | str, ...]) -> tuple[str, Sequence[type[BaseModel]]]:
    """Follow an error's location, such as `("search", "num_trials")`, through the tables.

    Where a table's `name` chose among several, the location holds that name; no key is called so.

    Returns:
        The path as it is in the file, and the models of the last table on it: several where the
        choice is still open.
    """
    path: list[str] = []
    models: Sequence[type[BaseModel]] = (Project,)
    for part in location:
        if len(models) > 1:
            models = [model for model in models if _name_of(model) == part]
            continue
        path.append(str(part))
        field = models[0].model_fields.get(str(part)) if models else None
        if field is not None:
            models = tables_of(field) or models
    return ".".join(path), models


def tables_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Give the models that a key's value may be a table of: none, one, or several by `name`."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _name_of(model: type[BaseModel]) -> str:
    return str(model.model_fields["name"].default)
