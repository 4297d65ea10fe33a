"""The search for hyper-parameters, run by Ray Tune.

Each trial is a plain function in one process, which trains or plays a campaign (`campaigns`): a
trainer nested in a trial hangs when Tune stops it, and takes ten times as long to start. What
begins and what is cut is decided by `minga.training.search.course`; Tune places the trials, starts
and stops them, and hears of failures.

An interrupted search is kept in its folder, whatever interrupted it; calling `search` again with
that folder goes on. No trial that has ended is repeated, and of the others no epoch.
"""

import contextlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from minga.federation.durable import replacing
from minga.federation.errors import CampaignError
from minga.training.config import SearchConfig
from minga.training.errors import DivergedError, TrainingError, last_line
from minga.training.history import Record
from minga.training.interrupts import handlers_restored
from minga.training.loop import Learner, fit
from minga.training.network import build_network
from minga.training.progress import OnProgress, Progress, silent
from minga.training.search.course import Course, Pause
from minga.training.search.ledger import Entry, Ledger
from minga.training.space import Params
from minga.training.task import Splits, Task, TaskReference
from minga.training.trials import SearchResult, Trial

if TYPE_CHECKING:
    from minga.training.search.campaigns import Federation

# The ledger keeps what a search goes on from: Tune need not save it as well, nor log it.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

RECORD = "record/"
"""Begins the names of our own figures in a report; Tune adds others, and flattens all."""

DIVERGED = "diverged"

OnTrialEpoch = Callable[[int, Params, Record], None]
"""Gets a trial's number, its complete hyper-parameters and an epoch's record."""


def unheard(number: int, params: Params, record: Record) -> None:
    """Tell nobody of an epoch."""


def search(
    reference: TaskReference,
    task: Task,
    splits: Splits,
    *,
    config: SearchConfig,
    seed: int,
    folder: Path,
    federation: "Federation | None" = None,
    points: Sequence[Params] = (),
    on_progress: OnProgress = silent,
    on_epoch: OnTrialEpoch = unheard,
) -> SearchResult:
    """Search the Task's space; the first trial is its defaults. Ray must be running.

    Args:
        reference: of the Task, which every trial's process loads for itself.
        task: the same, loaded.
        splits: travel to the trials through Ray's object store.
        config: what is tried, how many trials, how long, how many at once.
        seed: of the drawn parameters, and of each trial's training.
        folder: of this search and no other; only reuse it with the same arguments.
        federation: what trials are played on; without it they are trained.
        points: of the space, tried right after the defaults.
        on_progress: hears of every epoch of every trial.
        on_epoch: gets every epoch of every trial as it ends.

    Raises:
        TaskError: what is to be searched and how does not go together.
        TrainingError: every trial failed.
        KeyboardInterrupt: the user stopped it; what is done is kept in `folder`.
    """
    if not task.search_space:
        return SearchResult(params=dict(task.defaults), metrics={}, trials=(), resumed=False)
    course = Course(task, config, seed, Ledger(folder), points)
    desk = _Desk(course, on_progress, on_epoch)
    errors: list[str] = []
    if not course.is_complete:
        work = _Work(
            reference=reference,
            splits=splits,
            seed=seed,
            config=config,
            folder=str(folder),
            federation=federation,
        )
        with _at(desk), handlers_restored():
            results = _tuner(work, course, folder).fit()
        errors = [last_line(error) for error in results.errors]
    if not course.is_complete:
        raise KeyboardInterrupt(
            f"{course.num_ended} of {course.num_trials} trials are kept in {folder}; "
            "the same command goes on from there"
        )
    best = _best(course, errors)
    return SearchResult(
        params=best.params, metrics=best.metrics, trials=course.trials(), resumed=course.resumed
    )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every trial needs."""

    reference: TaskReference
    splits: Splits
    seed: int
    config: SearchConfig
    folder: str
    federation: "Federation | None"


def _tuner(work: _Work, course: Course, folder: Path) -> "tune.Tuner":
    scratch = folder / "tune"
    shutil.rmtree(scratch, ignore_errors=True)
    trainable = tune.with_resources(
        tune.with_parameters(_run_trial, work=work),
        {"cpu": 1, "gpu": course.config.gpus_per_trial},
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=course.config.max_concurrent,
            search_alg=_Asker(),
            scheduler=_Judge(),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name=scratch.name, storage_path=str(folder), verbose=0),
    )


def _run_trial(config: dict[str, Any], *, work: _Work) -> None:
    """Run one trial in its own process; goes on from its own file if there is one."""
    entry = Entry.model_validate(config["entry"])
    task = work.reference.load()
    try:
        if work.federation is not None:
            from minga.training.search.campaigns import play_trial

            simulation = work.federation.simulation(
                task, work.splits, entry.params, num_rounds=work.config.max_epochs, seed=work.seed
            )
            file = Path(work.folder) / entry.campaign
            play_trial(simulation, entry, file, lambda record: tune.report(_figures(record)))
        else:
            _train_trial(task, entry, int(config["until"]), work)
    except (DivergedError, CampaignError):
        # Part of the answer, not a failure of the search: these parameters are the worst.
        tune.report({DIVERGED: True})


def _train_trial(task: Task, entry: Entry, until: int, work: _Work) -> None:
    """Train until an epoch is behind the trial."""
    folder = Path(work.folder)
    learner = _learner(task, entry, work, folder)
    for record in learner.history[len(entry.history) :]:
        tune.report(_figures(record))
    file = folder / entry.learner

    def report(record: Record) -> bool:
        with replacing(file) as unfinished:
            torch.save({"params": entry.params, **learner.state()}, unfinished)
        tune.report(_figures(record))
        return record["epoch"] >= until

    if len(learner.history) < until:
        fit(
            learner,
            work.splits.train,
            epochs=work.config.max_epochs,
            seed=work.seed,
            validation=work.splits.validation,
            on_epoch=report,
        )


def _figures(record: Record) -> dict[str, float]:
    return {RECORD + name: value for name, value in record.items()}


def _learner(task: Task, entry: Entry, work: _Work, folder: Path) -> Learner:
    """Make the learner of a trial, with its own state, its source's, or none."""
    params = {**task.defaults, **entry.params}
    device = torch.device("cuda" if work.config.gpus_per_trial and _has_gpu() else "cpu")
    network = build_network(task, params, work.splits.train, seed=work.seed).to(device)
    learner = Learner(task, network, params)
    own = _read_learner(folder / entry.learner, device)
    # After a power cut a number may have come to other parameters than the file's.
    if own is not None and own["params"] == entry.params:
        learner.load(own)
    elif entry.source:
        source = entry.model_copy(
            update={"number": entry.source, "generation": entry.generation - 1}
        )
        state = _read_learner(folder / source.learner, device)
        if state is None:
            raise TrainingError(f"{folder / source.learner} is missing; search anew with --fresh")
        learner.adopt(state)
    return learner


def _has_gpu() -> bool:
    return bool(torch.cuda.is_available())


def _read_learner(file: Path, device: torch.device) -> dict[str, Any] | None:
    if not file.exists():
        return None
    state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    return state


def _best(course: Course, errors: Sequence[str]) -> Trial:
    """Give the trial with the best epoch; a diverged one does not count."""
    objective, trials = course.task.objective, course.trials()
    sound = [
        trial
        for trial in trials
        if trial.status in ("finished", "cut")
        and math.isfinite(trial.metrics.get(objective.metric, math.nan))
    ]
    if not sound:
        is_campaign = course.config.over == "simulation"
        reason = errors[0] if errors else "the loss diverged"
        raise TrainingError(
            f"none of {len(trials)} trials gave a {objective.metric}: {reason}; try one set of "
            f"parameters alone with: minga {'simulate' if is_campaign else 'train'}"
        )
    return max(sound, key=lambda trial: objective.gain(trial.metrics[objective.metric], 0.0))


class _Desk:
    """What Tune's searcher and scheduler talk to: the course, and whoever listens to it."""

    def __init__(self, course: Course, on_progress: OnProgress, on_epoch: OnTrialEpoch) -> None:
        self.course = course
        self._on_progress = on_progress
        self._on_epoch = on_epoch
        self._entries: dict[str, Entry] = {}

    def begin(self, trial_id: str) -> Entry | Pause:
        """Begin the next trial."""
        entry = self.course.next()
        if isinstance(entry, Entry):
            self._entries[trial_id] = entry
        return entry

    def note(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take a report of Tune, and tell whether the trial is to stop."""
        entry, objective = self._entries[trial_id], self.course.task.objective
        if result.get(DIVERGED):
            self.course.end(entry, diverged=True)
            return True
        record = {
            name.removeprefix(RECORD): float(value)
            for name, value in result.items()
            if name.startswith(RECORD)
        }
        if not record:
            return False  # Tune's word that the trial's function has returned
        stop = self.course.note(entry, record)
        self._on_epoch(entry.number, {**self.course.task.defaults, **entry.params}, record)
        value = record.get(objective.metric, math.nan)
        epoch = int(record["epoch"])
        word = "round" if self.course.config.over == "simulation" else "epoch"
        self._announce(f"trial {entry.number}: {word} {epoch}, {objective.metric} {value:.4f}")
        return stop

    def end(self, trial_id: str, *, failed: bool = False) -> None:
        """Take the end of a trial."""
        entry = self._entries[trial_id]
        self.course.end(entry, failed=failed)
        self._announce(f"trial {entry.number} {'failed' if failed else 'ended'}")

    def _announce(self, note: str) -> None:
        done, total = self.course.num_ended, self.course.num_trials
        self._on_progress(Progress(step="search", done=done, total=total, note=note))


_desk: ContextVar[_Desk] = ContextVar("desk")
"""Where this process's search is. Tune copies searchers and schedulers: they hold nothing."""


class _Asker(Searcher):  # type: ignore[misc]
    """Asks the desk what is tried next."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        entry = _desk.get().begin(trial_id)
        if isinstance(entry, Pause):
            return None if entry is Pause.LATER else str(Searcher.FINISHED)
        until = _desk.get().course.until(entry)
        return {"entry": entry.model_dump(mode="json"), "until": until}

    def on_trial_complete(self, trial_id: str, *_: Any, error: bool = False, **__: Any) -> None:
        if not error:
            _desk.get().end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the ledger does."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class _Judge(FIFOScheduler):  # type: ignore[misc]
    """Tells the desk of every epoch, and Tune which trials are to stop."""

    def on_trial_result(self, _: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = _desk.get().note(trial.trial_id, result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, _: Any, trial: Any) -> None:
        _desk.get().end(trial.trial_id, failed=True)


@contextlib.contextmanager
def _at(desk: _Desk) -> Iterator[None]:
    """Let Tune's events come to a desk, and keep Tune's tables off stdout."""
    token = _desk.set(desk)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        _desk.reset(token)
