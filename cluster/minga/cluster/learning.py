"""Search and training for a project: what is recorded where, and what goes on after a stop.

Unfinished work lies in the project's `ray_storage`, named by all that decides its result. What
interrupted it does not matter: Ctrl-C, a crash, a power cut; the same call goes on.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from minga.cluster.checking import data_tags, require_valid_data
from minga.cluster.occupation import occupied
from minga.cluster.project import Project
from minga.cluster.stack import local_ray
from minga.federation.parameters import Parameters, to_bytes
from minga.training.bundle import LINEAGE, read_parameters
from minga.training.evaluate import measure
from minga.training.lineage import Lineage
from minga.training.network import build_network, load_parameters
from minga.training.probe import probe
from minga.training.progress import OnProgress, Progress, silent
from minga.training.search.picture import search_page
from minga.training.space import Params, is_network
from minga.training.trials import SearchResult

if TYPE_CHECKING:
    from minga.training.models import Model
    from minga.training.search.campaigns import Federation
    from minga.training.tracking import Tracker
    from minga.training.train import Trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A model that is no network.

    Attributes:
        model: what answers and exports.
        params: what it is named by.
        metrics: on the validation split.
        run_id: of the MLflow run that recorded it.
    """

    model: "Model"
    params: Params
    metrics: Mapping[str, float]
    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A version that training goes on from.

    Attributes:
        version: its number.
        parameters: of its network.
        params: the hyper-parameters that this is built with.
    """

    version: int
    parameters: Parameters
    params: Params


PAGE = "search.html"
"""The picture of a search, among the files of its run."""


def search(
    project: Project, on_progress: OnProgress = silent, *, fresh: bool = False
) -> SearchResult:
    """Search the Task's hyper-parameters, over trainings or over simulated federations.

    A finished search is kept; the same code, data and settings give it again without a trial. Only
    networks are searched: a Task whose defaults name another kind of model keeps these.

    Args:
        project: the project.
        on_progress: hears of every epoch of every trial.
        fresh: search anew, even if there is a finished or an interrupted search.

    Raises:
        SchemaError: the data breaks its schema; nothing was started.
        ShapeError: one training step does not work; nothing was started.
        DataError, CampaignError, PrivacyError: there is no campaign to play.
        TrainingError: every trial failed.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    if not is_network(project.loaded_task.defaults):
        defaults = dict(project.loaded_task.defaults)
        return SearchResult(params=defaults, metrics={}, trials=(), resumed=False)
    if not fresh and (kept := finished_search(project)) is not None:
        total = len(kept.trials)
        note = "kept from an earlier search of the same code, data and settings"
        on_progress(Progress(step="search", done=total, total=total, note=note))
        return kept
    require_valid_data(project)
    probe(project.loaded_task, project.loaded_task.defaults, project.splits)
    federation = _federation(project)
    folder = _search_folder(project)
    if fresh:
        _discard(folder)
    tracker = project.tracker(on_progress)
    on_progress(Progress(step="search", done=0, total=project.search.num_trials))
    tags = {"minga.step": "search", **data_tags(project)}
    with (
        occupied(project),
        tracker.run("search", tags=tags, kept=folder.with_suffix(".run")) as run_id,
        local_ray(),
    ):
        found = _search(
            project, tracker, run_id, folder, federation=federation, on_progress=on_progress
        )
    found.write(_search_file(project))
    _discard(folder)
    return found


def _federation(project: Project) -> "Federation | None":
    """Give what trials are played on, if they are; refuse what none of them could do."""
    if project.search.over != "simulation":
        return None
    from minga.training.search.campaigns import Federation, require_searchable  # noqa: PLC0415

    federation = Federation(
        config=project.federation, devices=project.simulation, root=project.directory
    )
    require_searchable(
        federation,
        project.loaded_task,
        project.splits,
        num_rounds=project.search.max_epochs,
        seed=project.seed,
    )
    return federation


def _search(
    project: Project,
    tracker: "Tracker",
    run_id: str,
    folder: Path,
    *,
    federation: "Federation | None",
    on_progress: OnProgress,
) -> SearchResult:
    """Search, with a nested run for each trial."""
    # Ray reads its settings when it is imported, so not before it is started.
    from minga.training.recording import recording  # noqa: PLC0415
    from minga.training.search.runs import TrialRuns, earlier_points  # noqa: PLC0415
    from minga.training.search.tuning import search as run_search  # noqa: PLC0415

    task, config = project.loaded_task, project.search
    tracker.log_settings(run_id, project.model_dump(mode="json"))
    points = (
        earlier_points(tracker, task, config.warm_start, over=config.over)
        if config.warm_start
        else ()
    )
    with recording(tracker, project.tensorboard_folder / f"search-{run_id[:8]}") as recorder:
        runs = TrialRuns(tracker, recorder, run_id, task.objective, config.over)
        found = run_search(
            project.reference,
            task,
            project.splits,
            config=config,
            seed=project.seed,
            folder=folder,
            federation=federation,
            points=points,
            on_progress=on_progress,
            on_epoch=runs.note,
        )
    runs.end(found.trials)
    tracker.log(run_id, params=found.params, metrics=found.metrics)
    page = search_page(found, task.objective, title=f"{task.name}: search")
    tracker.client.log_text(run_id, page, PAGE)
    picture_of(project).write_text(page, encoding="utf-8")
    return found


def finished_search(project: Project) -> SearchResult | None:
    """Give the result of a finished search of the same code, data and settings, if there is one."""
    file = _search_file(project)
    if not file.exists():
        return None
    return SearchResult.read(file)


def picture_of(project: Project) -> Path:
    """Name the page that shows the search of the same code, data and settings, once it is over."""
    return _search_file(project).with_suffix(".html")


def parent_of(project: Project, which: int | str) -> Parent:
    """Read a version that training is to go on from, by number or alias.

    Raises:
        RegistryError: there is no such version, it is no network, or its files are not what was
            registered.
    """
    registry, name = project.registry(), project.loaded_task.name
    version = registry.get(name, which)
    folder = registry.fetch(name, version.version)
    return Parent(
        version=version.version,
        parameters=read_parameters(folder),
        params=Lineage.read(folder / LINEAGE).params,
    )


def train_model(
    project: Project,
    params: Params,
    on_progress: OnProgress = silent,
    *,
    parent: Parent | None = None,
) -> "Trained":
    """Train with given hyper-parameters, as the `[training]` table says.

    Args:
        project: the project.
        params: complete hyper-parameters, such as `SearchResult.params`.
        on_progress: hears of every epoch.
        parent: whose weights to go on from; new ones are drawn without.

    Raises:
        SchemaError: the data breaks its schema; nothing was started.
        ShapeError: one training step does not work, or the Task's network is not the parent's any
            more; nothing was started.
        TrainingError: it failed more often than it may.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    require_valid_data(project)
    probe(project.loaded_task, params, project.splits)
    if parent is not None:
        train_split = project.splits.train
        network = build_network(project.loaded_task, params, train_split, seed=project.seed)
        load_parameters(network, parent.parameters)
    tracker = project.tracker(on_progress)
    folder = _training_folder(project, params, parent)
    tags = {"minga.step": "train", **data_tags(project)}
    if parent is not None:
        tags["minga.parent_version"] = str(parent.version)
    with (
        occupied(project),
        tracker.run("train", tags=tags, kept=folder.with_suffix(".run")) as run_id,
        local_ray(),
    ):
        # Ray reads its settings when it is imported, so not before it is started.
        from minga.training.recording import recording  # noqa: PLC0415
        from minga.training.train import train  # noqa: PLC0415

        tracker.log(run_id, params={**params, "seed": project.seed})
        tracker.log_settings(run_id, project.model_dump(mode="json"))
        with recording(tracker, project.tensorboard_folder) as recorder:
            recorder.open(run_id, f"train-{run_id[:8]}")
            trained = train(
                project.reference,
                project.loaded_task,
                project.splits,
                params,
                config=project.training,
                seed=project.seed,
                folder=folder,
                start=parent.parameters if parent else None,
                on_progress=on_progress,
                on_epoch=partial(recorder.note, run_id),
            )
    return replace(trained, run_id=run_id, parent_version=parent.version if parent else None)


def fit_contender(project: Project, params: Params, on_progress: OnProgress = silent) -> Fitted:
    """Fit what is no network, in this process; see `minga.training.selection`.

    Args:
        project: the project.
        params: name it by `architecture`.
        on_progress: hears when it is done.

    Raises:
        SchemaError: the data breaks its schema; nothing was started.
        TaskError: there is no such contender, or it cannot serve the Task.
    """
    from minga.training.selection.contenders import contender_of  # noqa: PLC0415 - loads torch

    require_valid_data(project)
    task, splits = project.loaded_task, project.splits
    contender = contender_of(task, params, project.training)
    on_progress(Progress(step="train", done=0, total=1, note=contender.name))
    tracker = project.tracker(on_progress)
    tags = {"minga.step": "train", **data_tags(project)}
    with occupied(project), tracker.run("train", tags=tags) as run_id:
        tracker.log(run_id, params={**params, "seed": project.seed})
        tracker.log_settings(run_id, project.model_dump(mode="json"))
        model = contender.fit(splits.train, splits.validation, seed=project.seed)
        outputs = model.predict(splits.validation.inputs)
        metrics = measure(task, outputs, splits.validation.targets)
        tracker.log(run_id, metrics=metrics)
    told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    on_progress(Progress(step="train", done=1, total=1, note=f"{contender.name}: {told}"))
    return Fitted(model=model, params=dict(params), metrics=metrics, run_id=run_id)


def _training_folder(project: Project, params: Params, parent: Parent | None) -> Path:
    settings: tuple[object, ...] = (project.training, dict(params))
    if parent is not None:
        settings += (parent.version, hashlib.sha256(to_bytes(parent.parameters)).hexdigest())
    work = fingerprint(project, settings)
    return project.ray_storage / f"train-{work}"


def _search_folder(project: Project) -> Path:
    settings: tuple[object, ...] = (project.search,)
    if project.search.over == "simulation":
        settings += (project.federation, project.simulation)
    return project.ray_storage / f"search-{fingerprint(project, settings)}"


def _search_file(project: Project) -> Path:
    return _search_folder(project).with_suffix(".json")


def fingerprint(project: Project, settings: object) -> str:
    """Name work by all that decides its result: code beside the Task, data, seed and settings."""
    facts = (metadata.version("minga"), project.seed, settings, project.data.features)
    digest = hashlib.sha256(" ".join(map(str, facts)).encode())
    for file in sorted(project.reference.file.parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    digest.update(project.data_digest.encode())
    return digest.hexdigest()[:16]


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
