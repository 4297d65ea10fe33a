"""The central path, step by step, for a project.

    check_data -> search -> (select_model ->) train -> register -> promote

`run` takes all of them. Each step leaves its record in MLflow and can be called alone; what a step
needs from an earlier one is an argument. An interrupted search or training goes on when the same
step is called again for the same code, data and settings.
"""

import inspect
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from minga.cluster.checking import find_champion, require_valid_data
from minga.cluster.learning import (
    Fitted,
    Parent,
    fingerprint,
    finished_search,
    fit_contender,
    parent_of,
    search,
    train_model,
)
from minga.cluster.occupation import occupied
from minga.cluster.project import Project
from minga.cluster.runs import open_run, settings_of
from minga.cluster.runtimes import runtimes_for
from minga.cluster.selecting import select_model
from minga.cluster.stack import local_ray
from minga.federation.parameters import Parameters
from minga.training.boards import draw_version
from minga.training.bundle import (
    GATES,
    LINEAGE,
    MODEL,
    SCHEMA,
    Bundle,
    has_weights,
    read_authors,
    read_parameters,
    read_verdict,
)
from minga.training.candidate import Candidate, Champion, assess
from minga.training.data import DataReport
from minga.training.errors import ApprovalError
from minga.training.evaluate import evaluate as evaluate_network
from minga.training.gates import GateReport
from minga.training.lineage import Campaign, Lineage, trace
from minga.training.models import ExportedModel, Model
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.probe import probe
from minga.training.progress import OnProgress, Progress, silent
from minga.training.registry import CHALLENGER, Version
from minga.training.schema import Schema
from minga.training.space import Params, is_network
from minga.training.task import SplitName
from minga.training.trials import SearchResult

if TYPE_CHECKING:
    from minga.training.selection.comparison import Selection
    from minga.training.train import Trained

__all__ = [
    "Parent",
    "Registered",
    "RunReport",
    "evaluate",
    "find_registered",
    "fingerprint",
    "finished_search",
    "parent_of",
    "promote",
    "register_candidate",
    "register_trained",
    "run",
    "search",
    "select_model",
    "train",
    "train_model",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A version that was just registered, blessed or not.

    Attributes:
        bundle_path: its files, which are the registry's: only read them.
        metrics: on the test split.
    """

    name: str
    version: int
    run_id: str
    report: GateReport
    bundle_path: Path
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What the whole path came to.

    Attributes:
        selection: None if no kinds of models were compared.
        seconds: by step.
    """

    data: DataReport
    search: SearchResult
    selection: "Selection | None"
    trained: "Trained | Fitted"
    registered: Registered
    promoted: bool
    seconds: Mapping[str, float]


@dataclass(slots=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run(
    project: Project,
    on_progress: OnProgress = silent,
    *,
    fresh_search: bool = False,
    auto: bool = False,
    parent: Parent | None = None,
) -> RunReport:
    """Check data, search, train, judge, register, and promote if all gates passed.

    Args:
        project: the project.
        on_progress: hears of each part.
        fresh_search: search and compare anew, even if a result is kept.
        auto: compare kinds of models after the search, and train the one that is chosen.
        parent: train this version further, with its hyper-parameters, in place of a search.

    Raises:
        SchemaError: the data breaks its schema.
        TrainingError: search or training failed; its subclasses say how.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    clock = _Clock()
    with clock.step("data"):
        report = require_valid_data(project)
        # Before Ray is started, which takes seconds.
        probe(project.loaded_task, project.loaded_task.defaults, project.splits)
        on_progress(Progress(step="data", done=1, total=1, note=_describe(report)))
    # Making a database takes seconds as well.
    meanwhile = partial(project.tracker, on_progress)
    with occupied(project), local_ray(meanwhile=meanwhile):
        with clock.step("search"):
            if parent is None:
                found = search(project, on_progress, fresh=fresh_search)
            else:
                found = SearchResult(
                    params=dict(parent.params), metrics={}, trials=(), resumed=False
                )
        params: Params = found.params
        selection = None
        if auto:
            with clock.step("compare"):
                selection, params = select_model(project, params, on_progress, fresh=fresh_search)
        with clock.step("train"):
            trained = train(project, params, on_progress, parent=parent)
    with clock.step("gate and register"):
        registered = register_trained(project, trained, on_progress)
    promoted = promote_if_allowed(project, registered)
    return RunReport(
        data=report,
        search=found,
        selection=selection,
        trained=trained,
        registered=registered,
        promoted=promoted,
        seconds=clock.seconds,
    )


def train(
    project: Project,
    params: Params,
    on_progress: OnProgress = silent,
    *,
    parent: Parent | None = None,
) -> "Trained | Fitted":
    """Train what hyper-parameters stand for: a network, or another contender.

    Args:
        project: the project.
        params: complete hyper-parameters.
        on_progress: hears of every epoch.
        parent: a network whose weights to go on from.

    Raises:
        Exception: as `train_model` and `fit_contender` do.
    """
    if is_network(params) or parent is not None:
        return train_model(project, params, on_progress, parent=parent)
    return fit_contender(project, params, on_progress)


def register_trained(
    project: Project, trained: "Trained | Fitted", on_progress: OnProgress = silent
) -> Registered:
    """Judge and register what `train` gave; see `register_candidate`."""
    if isinstance(trained, Fitted):
        made: dict[str, Any] = {"model": trained.model}
    else:
        made = {"parameters": trained.parameters, "parent_version": trained.parent_version}
    return register_candidate(
        project, **made, params=trained.params, run_id=trained.run_id, on_progress=on_progress
    )


def register_candidate(
    project: Project,
    *,
    params: Params,
    parameters: Parameters | None = None,
    model: Model | None = None,
    run_id: str = "",
    parent_version: int | None = None,
    campaign: Campaign | None = None,
    authors: frozenset[str] = frozenset(),
    on_progress: OnProgress = silent,
) -> Registered:
    """Export a model, judge it on the test split, and register it with the verdict.

    A blessed version becomes the challenger; `promote` makes it the champion.

    Args:
        project: whose Task, test split and gates count.
        params: the hyper-parameters that the network is built with, or that name the model.
        parameters: of the complete network, from central training or from a campaign.
        model: in place of parameters, what is no network.
        run_id: of the run that trained it; without one a run is made.
        parent_version: the version whose parameters it started from.
        campaign: what it is the product of, if it was federated.
        authors: public keys of those who made or judged the same model before.
        on_progress: hears of each part.

    Raises:
        SchemaError: the data breaks its schema; nothing was registered.
        ShapeError: the parameters are not of the network that `params` describe.
        TaskError: the network does not export to ONNX.
    """
    require_valid_data(project)
    on_progress(Progress(step="gate", done=0, total=1, note="export, compare, measure"))
    splits = project.splits
    trained = _network(project, parameters, params) if parameters is not None else model
    lineage = trace(
        project.loaded_task,
        project.reference,
        params=params,
        seed=project.seed,
        source=project.source,
        data_digest=project.data_digest,
        data_versions=project.data_versions,
        num_examples=campaign.num_examples if campaign else len(splits.train),
        settings_sha256=settings_of(project, run_id),
        parent_version=parent_version,
        campaign=campaign,
    )
    run_id = run_id or open_run(project, lineage, on_progress)
    candidate, schema = _assess(project, trained, run_id)
    bundle = Bundle(
        onnx=candidate.onnx,
        parameters=parameters,
        schema=schema,
        profile=candidate.profile,
        gates=candidate.report,
        lineage=lineage,
        description=inspect.getdoc(project.loaded_task) or "",
        authors=authors,
    )
    registered = _store(project, bundle, run_id)
    verdict = "all gates passed" if registered.report.blessed else "refused"
    on_progress(Progress(step="gate", done=1, total=1, note=verdict))
    return registered


def finish(project: Project, parameters: Parameters, params: Params) -> Parameters:
    """Let the Task set what it chooses on validation examples, after training elsewhere.

    Raises:
        ShapeError: the parameters are not of the network that `params` describe.
    """
    network = _network(project, parameters, params)
    project.loaded_task.finish(network, project.splits.validation)
    return parameters_of(network)


def find_registered(project: Project, *, run_id: str = "", campaign: str = "") -> Registered | None:
    """Give the version of a run, or the product of a campaign; None if it is not registered yet."""
    registry, name = project.registry(), project.loaded_task.name
    versions = registry.list_versions(name) if name in registry.names() else ()
    for version in versions:
        is_runs = bool(run_id) and version.run_id == run_id
        if is_runs or (campaign and version.tags.get("minga.campaign") == campaign):
            folder = registry.fetch(name, version.version)
            report = GateReport.read(folder / GATES)
            return Registered(
                name=name,
                version=version.version,
                run_id=version.run_id,
                report=report,
                bundle_path=folder,
                metrics=report.metrics,
            )
    return None


def judge_anew(project: Project, which: int | str, on_progress: OnProgress = silent) -> Registered:
    """Judge a version against today's champion, data and limits, and register it with that verdict.

    Versions do not change, so the verdict is on a new one with the same weights.

    Raises:
        SchemaError: the data breaks its schema.
        RegistryError: there is no such version, or its files are not what was registered.
        VerdictError: its verdict is altered or not by a trusted key.
        ShapeError: the Task's network is another one now.
    """
    require_valid_data(project)
    registry = project.registry()
    version = registry.get(project.loaded_task.name, which)
    folder = registry.fetch(version.name, version.version)
    read_verdict(folder, version.name, project.keyring)  # its authors are those of these files
    lineage = Lineage.read(folder / LINEAGE)
    is_network_still = has_weights(folder)
    return register_candidate(
        project,
        parameters=read_parameters(folder) if is_network_still else None,
        model=None if is_network_still else ExportedModel((folder / MODEL).read_bytes()),
        params=lineage.params,
        parent_version=version.version,
        campaign=lineage.campaign,
        authors=read_authors(folder, project.keyring),
        on_progress=on_progress,
    )


def promote_if_allowed(project: Project, registered: Registered) -> bool:
    """Promote a version that was just registered, unless its gates refused it or others must agree.

    Returns:
        whether it is champion now.

    Raises:
        Exception: as `promote` does, beside `ApprovalError`.
    """
    if not registered.report.blessed:
        return False
    try:
        promote(project, registered.version)
    except ApprovalError:
        return False  # it stays the challenger
    return True


def promote(project: Project, version: int | str, *, override: str = "") -> Version:
    """Make a version of the project's model the champion; see `Registry.promote`.

    Raises:
        GateError: its gates refused it, and `override` gives no reason to do it nevertheless.
        ApprovalError: too few others approved it.
        ConflictError: somebody else promoted another version in the meantime.
        RegistryError: there is no such version, or its files are not what was registered.
    """
    return project.registry().promote(project.loaded_task.name, version, override=override)


def evaluate(
    project: Project, parameters: Parameters, params: Params, split: SplitName = "test"
) -> dict[str, float]:
    """Measure any parameters on a split of the project's data.

    Raises:
        ShapeError: the parameters are not of the network that `params` describe.
    """
    network = _network(project, parameters, params)
    return evaluate_network(project.loaded_task, network, project.splits[split])


def _network(project: Project, parameters: Parameters, params: Params) -> nn.Module:
    network = build_network(project.loaded_task, params, project.splits.train, seed=project.seed)
    load_parameters(network, parameters)
    return network


def _assess(
    project: Project, trained: nn.Module | Model | None, run_id: str
) -> tuple[Candidate, Schema]:
    """Export a model, and judge it against the champion, and in the runtimes that will load it."""
    assert trained is not None, "there are parameters of a network, or another model"
    task, splits = project.loaded_task, project.splits
    schema, champion = project.data_schema, find_champion(project)
    candidate = assess(
        task,
        trained,
        splits.test,
        schema=schema,
        profile=project.data_profile,
        champion=_read_champion(project, champion) if champion else None,
        config=project.gates,
        seed=project.seed,
        try_out=runtimes_for(
            task.name,
            partial(project.registry().stage, run_id),
            timeout_s=project.gates.trial_timeout_s,
        ),
    )
    return candidate, schema


def _store(project: Project, bundle: Bundle, run_id: str) -> Registered:
    """Register a bundle, and make it the challenger if it is blessed."""
    registry, report, lineage = project.registry(), bundle.gates, bundle.lineage
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        bundle.write(folder, project.keyring)
        version = registry.register(
            lineage.task,
            folder,
            run_id=run_id,
            blessed=report.blessed,
            tags={
                "minga.origin": lineage.origin,
                "minga.data_sha256": lineage.data_digest,
                **({"minga.campaign": lineage.campaign.name} if lineage.campaign else {}),
            },
        )
    test_metrics = {f"test_{name}": value for name, value in report.metrics.items()}
    tags = {"minga.version": str(version.version)}
    project.tracker().log(run_id, metrics=test_metrics, tags=tags)
    if report.blessed:
        registry.set_alias(version.name, CHALLENGER, version.version)
    draw_version(
        project.tensorboard_folder,
        version.version,
        bundle.onnx,
        params=lineage.params,
        metrics=report.metrics,
    )
    return Registered(
        name=version.name,
        version=version.version,
        run_id=run_id,
        report=report,
        bundle_path=registry.fetch(version.name, version.version),
        metrics=report.metrics,
    )


def _read_champion(project: Project, version: Version) -> Champion:
    folder = project.registry().fetch(version.name, version.version)
    return Champion(
        version=version.version,
        onnx=(folder / MODEL).read_bytes(),
        schema=Schema.read(folder / SCHEMA),
    )


def _describe(report: DataReport) -> str:
    counts = ", ".join(f"{count} {part}" for part, count in report.num_examples.items())
    warnings = len(report.violations) - len(report.errors)
    return f"{counts}; {warnings} warnings" if warnings else counts
