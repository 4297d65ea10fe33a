"""The search for hyper-parameters: Ray Tune with successive halving (ASHA, Li et al. 2020).

Each trial is a plain function in one process: a trainer nested in a trial hangs when Tune stops
it, and takes ten times as long to start. The same seed draws the same parameters; which trials are
cut early depends on which finished an epoch first, unless only one runs at a time.

An interrupted search is kept in its folder; calling `search` again with that folder goes on.
"""

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from minga.training.config import SearchConfig
from minga.training.errors import DivergedError, TrainingError
from minga.training.history import Record, best_record
from minga.training.interrupts import handlers_restored
from minga.training.loop import Learner, fit
from minga.training.network import build_network
from minga.training.progress import OnProgress, Progress, silent
from minga.training.space import Choice, Domain, LogUniform, Params, RandInt, Uniform
from minga.training.task import Splits, Task, TaskReference
from minga.training.trials import SearchResult, Trial, TrialStatus

TRIAL_ID = re.compile(r"[0-9a-f]{5}_\d{5}")
"""In the name of a trial's folder, where Tune keeps it after every restart."""

# How often Tune saves the state that an interrupted search goes on from.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")


def search(
    reference: TaskReference,
    task: Task,
    splits: Splits,
    *,
    config: SearchConfig,
    seed: int,
    folder: Path,
    on_progress: OnProgress = silent,
) -> SearchResult:
    """Search the Task's space; the first trial is its defaults. Ray must be running.

    Args:
        reference: of the Task, which every trial's process loads for itself.
        task: the same, loaded.
        splits: travel to the trials through Ray's object store.
        config: how many trials, how long, how many at once.
        seed: of the drawn parameters, and of each trial's training.
        folder: of this search and no other; only reuse it with the same arguments.
        on_progress: hears of every epoch of every trial.

    Raises:
        TrainingError: every trial failed.
        KeyboardInterrupt: the user stopped it; what is done is kept in `folder`.
    """
    if not task.search_space:
        return SearchResult(params=dict(task.defaults), metrics={}, trials=(), resumed=False)
    trainable = tune.with_parameters(
        _run_trial,
        reference=reference,
        splits=splits,
        seed=seed,
        max_epochs=config.max_epochs,
        folder=str(folder),
    )
    resumed = tune.Tuner.can_restore(str(folder))
    if resumed:
        # What failed gets another try: something outside of code and data may have stopped it.
        tuner = tune.Tuner.restore(str(folder), trainable=trainable, resume_errored=True)
    else:
        tuner = _tuner(trainable, task, config, seed, folder)
    with _listening(on_progress), handlers_restored():
        results = tuner.fit()
    if results.num_terminated + results.num_errors < config.num_trials:
        raise KeyboardInterrupt(
            f"{results.num_terminated} of {config.num_trials} trials are kept in {folder}; "
            "the same command goes on from there"
        )
    found = (_trial(result, task, config, folder) for result in results)
    trials = tuple(sorted(found, key=attrgetter("number")))
    best = _best(trials, task, results.errors)
    return SearchResult(params=best.params, metrics=best.metrics, trials=trials, resumed=resumed)


def _tuner(
    trainable: Any, task: Task, config: SearchConfig, seed: int, folder: Path
) -> "tune.Tuner":
    defaults = {name: task.defaults[name] for name in task.search_space}
    return tune.Tuner(
        trainable,
        param_space={name: _to_tune(domain) for name, domain in task.search_space.items()},
        tune_config=tune.TuneConfig(
            metric=task.objective.metric,
            mode=task.objective.mode,
            num_samples=config.num_trials,
            search_alg=BasicVariantGenerator(
                points_to_evaluate=[defaults],
                max_concurrent=config.max_concurrent,
                random_state=seed,
            ),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=config.max_epochs,
                grace_period=min(config.grace_epochs, config.max_epochs),
                reduction_factor=config.reduction_factor,
            ),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            callbacks=[_Announcer(task.objective.metric, config.num_trials)],
        ),
    )


def _run_trial(
    config: dict[str, Any],
    *,
    reference: TaskReference,
    splits: Splits,
    seed: int,
    max_epochs: int,
    folder: str,
) -> None:
    """Train one trial in its own process; goes on from its own file if there is one."""
    task = reference.load()
    params = {**task.defaults, **config}
    learner = Learner(task, build_network(task, params, splits.train, seed=seed), params)
    file = _learner_file(Path(folder), _number(tune.get_context().get_trial_id()))
    state = _read_learner(file, params)
    if state is not None:
        learner.load(state)
        tune.report(learner.history[-1])

    def report(record: Record) -> bool:
        unfinished = file.with_suffix(".new")
        torch.save({"params": params, **learner.state()}, unfinished)
        unfinished.replace(file)
        tune.report(record)
        return False

    try:
        fit(
            learner,
            splits.train,
            epochs=max_epochs,
            seed=seed,
            validation=splits.validation,
            on_epoch=report,
        )
    except DivergedError:
        # Part of the answer, not a failure of the search: these parameters are the worst.
        tune.report({task.objective.metric: task.objective.worst, "epoch": max_epochs})


def _learner_file(folder: Path, number: int) -> Path:
    """Name the file that a trial goes on from.

    It is our own and no checkpoint of Tune: after a power cut Tune's last snapshot names
    checkpoints that it has deleted since, and such a trial could never go on.
    """
    return folder / f"trial-{number}.pt"


def _read_learner(file: Path, params: Params) -> dict[str, Any] | None:
    """Read what a trial left; None if it left nothing, or if its number had other parameters."""
    if not file.exists():
        return None
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state if state["params"] == params else None


def _to_tune(domain: Domain) -> Any:
    match domain:
        case Choice(options):
            return tune.choice(list(options))
        case Uniform(low, high):
            return tune.uniform(low, high)
        case LogUniform(low, high):
            return tune.loguniform(low, high)
        case RandInt(low, high):
            return tune.randint(low, high)


def _trial(result: Any, task: Task, config: SearchConfig, folder: Path) -> Trial:
    number = _number(TRIAL_ID.findall(Path(result.path).name)[0])
    params = {**task.defaults, **(result.config or {})}
    state = _read_learner(_learner_file(folder, number), params)
    history = state["history"] if state else []
    best = best_record(history, task.objective)
    status: TrialStatus = "finished" if len(history) >= config.max_epochs else "cut"
    if result.error is not None:
        status = "failed"
    elif (result.metrics or {}).get(task.objective.metric) == task.objective.worst:
        status = "diverged"
    return Trial(
        number=number,
        params=params,
        metrics={name: value for name, value in best.items() if name != "epoch"},
        epochs=len(history),
        status=status,
        history=tuple(history),
    )


def _best(trials: tuple[Trial, ...], task: Task, errors: list[Exception]) -> Trial:
    """Give the trial with the best epoch; a diverged one does not count."""
    metric = task.objective.metric
    sound = [
        trial
        for trial in trials
        if trial.status in ("finished", "cut")
        and math.isfinite(trial.metrics.get(metric, math.nan))
    ]
    if not sound:
        reason = str(errors[0]).strip().splitlines()[-1] if errors else "the loss diverged"
        raise TrainingError(
            f"none of {len(trials)} trials gave a {metric}: {reason}; try one set of parameters "
            "alone with: minga train"
        )
    return max(sound, key=lambda trial: task.objective.gain(trial.metrics[metric], 0.0))


_listener: ContextVar[OnProgress] = ContextVar("listener", default=silent)


class _Announcer(tune.Callback):  # type: ignore[misc]
    """Turns Tune's events into progress for whoever listens in this process.

    It is pickled with the search and comes back when an interrupted one is resumed, so it holds
    nothing that belongs to a process.
    """

    def __init__(self, metric: str, num_trials: int) -> None:
        self._metric = metric
        self._num_trials = num_trials

    def on_trial_result(
        self, *, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        value = float(result.get(self._metric, math.nan))
        epoch = int(result.get("epoch", 0))
        note = f"trial {_number(trial.trial_id)}: epoch {epoch}, {self._metric} {value:.4f}"
        self._announce({other.trial_id for other in trials if other.is_finished()}, note)

    def on_trial_complete(self, *, trials: list[Any], trial: Any, **_: Any) -> None:
        ended = {other.trial_id for other in trials if other.is_finished()} | {trial.trial_id}
        self._announce(ended, f"trial {_number(trial.trial_id)} ended")

    def on_trial_error(self, *, trials: list[Any], trial: Any, **_: Any) -> None:
        self.on_trial_complete(trials=trials, trial=trial)

    def _announce(self, ended: set[str], note: str) -> None:
        progress = Progress(step="search", done=len(ended), total=self._num_trials, note=note)
        _listener.get()(progress)


def _number(trial_id: str) -> int:
    """Give a trial's number, from 1 on, out of an id such as `ca3fc_00003`."""
    return int(trial_id.rpartition("_")[2]) + 1


@contextlib.contextmanager
def _listening(on_progress: OnProgress) -> Iterator[None]:
    """Route Tune's events to a listener, and keep Tune's tables off stdout."""
    token = _listener.set(on_progress)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        _listener.reset(token)
