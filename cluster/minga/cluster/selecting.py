"""The comparison of a project's contenders: what is recorded where, and what is kept.

As a search does, it leaves a run in MLflow with a nested one for each contender, and goes on after
an interruption.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minga.cluster.checking import data_tags, require_valid_data
from minga.cluster.learning import fingerprint
from minga.cluster.occupation import occupied
from minga.cluster.project import Project
from minga.cluster.stack import local_ray
from minga.training.progress import OnProgress, Progress, silent
from minga.training.selection.comparison import Selection, Standing
from minga.training.space import Params

if TYPE_CHECKING:
    from minga.training.tracking import Tracker

TABLE = "selection.json"
"""The comparison, among the files of its run."""


def select_model(
    project: Project, params: Params, on_progress: OnProgress = silent, *, fresh: bool = False
) -> tuple[Selection, Params]:
    """Compare kinds of models by cross-validation, and choose one.

    A finished comparison is kept; the same code, data, settings and hyper-parameters give it again.

    Args:
        project: the project.
        params: of the Task's own model.
        on_progress: hears of every fit.
        fresh: compare anew, even if there is a finished or an interrupted comparison.

    Returns:
        the comparison, and the hyper-parameters that stand for what was chosen.

    Raises:
        SchemaError: the data breaks its schema; nothing was started.
        DataError: there are too few examples.
        TaskError: a contender that is named does not exist.
        TrainingError: every contender failed.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    # Loads torch, and Ray reads its settings when it is imported, so not before it is started.
    from minga.training.selection.contenders import params_of  # noqa: PLC0415

    folder = _folder(project, params)
    file = folder.with_suffix(".json")
    if file.exists() and not fresh:
        selection = Selection.read(file)
        total = selection.num_folds * (len(selection.standings) + len(selection.failures))
        note = "kept from an earlier comparison of the same code, data and settings"
        on_progress(Progress(step="compare", done=total, total=total, note=note))
    else:
        require_valid_data(project)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        selection = _compare(project, params, folder, on_progress)
        selection.write(file)
        shutil.rmtree(folder, ignore_errors=True)
    return selection, params_of(project.loaded_task, selection.chosen, params)


def _compare(project: Project, params: Params, folder: Path, on_progress: OnProgress) -> Selection:
    tracker = project.tracker(on_progress)
    tags = {"minga.step": "compare", **data_tags(project)}
    with (
        occupied(project),
        tracker.run("compare", tags=tags, kept=folder.with_suffix(".run")) as run_id,
        local_ray(),
    ):
        from minga.training.selection.crossing import compare  # noqa: PLC0415 - imports Ray

        tracker.log_settings(run_id, project.model_dump(mode="json"))
        selection = compare(
            project.reference,
            project.loaded_task,
            project.splits,
            config=project.selection,
            training=project.training,
            params=params,
            seed=project.seed,
            folder=folder,
            on_progress=on_progress,
        )
        _record(tracker, run_id, selection)
    return selection


def _record(tracker: "Tracker", run_id: str, selection: Selection) -> None:
    """Write the comparison into its run, and a nested run for each contender."""
    runs = tracker.children(run_id)
    tags = {"minga.step": "contender"}
    for one in selection.standings:
        nested = runs.get(one.name) or tracker.start(one.name, tags=tags, parent=run_id)
        values = [
            {"epoch": fold, selection.metric: value} for fold, value in enumerate(one.values, 1)
        ]
        tracker.log(nested, history=values, metrics=_figures(one))
        tracker.end(nested, "FINISHED")
    for failure in selection.failures:
        nested = runs.get(failure.name) or tracker.start(failure.name, tags=tags, parent=run_id)
        tracker.log(nested, tags={"minga.reason": failure.reason})
        tracker.end(nested, "FAILED")
    told = {"minga.best": selection.best, "minga.chosen": selection.chosen}
    tracker.log(run_id, tags={**told, "minga.why": selection.why})
    tracker.client.log_text(run_id, selection.model_dump_json(indent=2), TABLE)


def _figures(one: Standing) -> dict[str, float]:
    """Name a standing's figures as metrics of its run."""
    means = {f"mean_{name}": value for name, value in one.metrics.items()}
    return means | {
        "mean_low": one.low,
        "mean_high": one.high,
        "behind": one.behind,
        "behind_low": one.behind_low,
        "behind_high": one.behind_high,
        "p_value": one.p_value,
        "size_bytes": float(one.size_bytes),
        "fit_s": one.seconds,
    }


def _folder(project: Project, params: Params) -> Path:
    settings = (project.selection, project.training, dict(params))
    return project.ray_storage / f"compare-{fingerprint(project, settings)}"
