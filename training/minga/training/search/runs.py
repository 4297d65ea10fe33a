"""The trials of a search as nested runs of MLflow, and what earlier searches left there."""

from collections.abc import Sequence

from minga.training.config import Over
from minga.training.history import Record
from minga.training.recording import Recorder
from minga.training.search.suggestions import parse
from minga.training.space import Objective, Param, Params
from minga.training.task import Task
from minga.training.tracking import Tracker
from minga.training.trials import Trial

STEP = "trial"
OVER = "minga.over"
"""The tag that says what a trial was: a training or a simulated campaign."""
MAX_EARLIER = 1000
"""Of the trials of earlier searches so many are looked at, the best first."""


class TrialRuns:
    """A run for each trial, opened with its first epoch; after an interruption the same ones."""

    def __init__(
        self,
        tracker: Tracker,
        recorder: Recorder,
        parent: str,
        objective: Objective,
        over: Over,
    ) -> None:
        self._tags = {"minga.step": STEP, OVER: over}
        self._tracker = tracker
        self._recorder = recorder
        self._parent = parent
        self._objective = objective
        self._runs = tracker.children(parent)
        self._open: set[str] = set()

    def note(self, number: int, params: Params, record: Record) -> None:
        """Take an epoch of a trial."""
        name = name_of(number)
        if name not in self._open:
            self._open.add(name)
            self._recorder.open(self._run(name), name)
            self._tracker.log(self._runs[name], params=params)
        self._recorder.note(self._runs[name], record)

    def end(self, trials: Sequence[Trial]) -> None:
        """Write what came of each trial, and end its run."""
        metric = self._objective.metric
        for trial in trials:
            run_id = self._run(name_of(trial.number))
            best = {best_of(metric): trial.metrics[metric]} if metric in trial.metrics else {}
            tags = {"minga.status": trial.status, "minga.epochs": str(trial.epochs)}
            self._tracker.log(run_id, metrics=best, tags=tags)
            self._tracker.end(run_id, "FAILED" if trial.status == "failed" else "FINISHED")

    def _run(self, name: str) -> str:
        if name not in self._runs:
            self._runs[name] = self._tracker.start(name, tags=self._tags, parent=self._parent)
        return self._runs[name]


def name_of(number: int) -> str:
    """Name a trial's run."""
    return f"trial {number}"


def best_of(metric: str) -> str:
    """Name the metric that a trial's best epoch has."""
    return f"best_{metric}"


def earlier_points(
    tracker: Tracker, task: Task, limit: int, *, over: Over
) -> list[dict[str, Param]]:
    """Give the best points of earlier searches that lie in the Task's space of today.

    What is good in a training need not be good in a campaign, whose values are others too: only
    searches over the same count.

    Args:
        tracker: of the Task's experiment.
        task: today's.
        limit: of points.
        over: what the trials are now.
    """
    order = "DESC" if task.objective.mode == "max" else "ASC"
    metric = best_of(task.objective.metric)
    runs = tracker.client.search_runs(
        [tracker.experiment_id],
        f"tags.`minga.step` = '{STEP}' and tags.`{OVER}` = '{over}' "
        "and tags.`minga.status` != 'failed'",
        max_results=MAX_EARLIER,
        order_by=[f"metrics.`{metric}` {order}"],
    )
    points: list[dict[str, Param]] = []
    for run in runs:
        if len(points) == limit:
            break
        texts = run.data.params
        values = {
            name: parse(domain, texts.get(name, "")) for name, domain in task.search_space.items()
        }
        point = {name: value for name, value in values.items() if value is not None}
        if metric in run.data.metrics and len(point) == len(values) and point not in points:
            points.append(point)
    return points
