"""The work of a comparison: every contender, fitted and judged in every fold, on Ray.

Each piece of work that is done is a file in the comparison's folder. An interrupted comparison goes
on with what is missing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from minga.federation.durable import replacing
from minga.training.config import SelectionConfig, TrainConfig
from minga.training.errors import TaskError
from minga.training.evaluate import measure
from minga.training.interrupts import handlers_restored
from minga.training.models import exported
from minga.training.progress import OnProgress, Progress, silent
from minga.training.selection.comparison import Outcome, Selection, select
from minga.training.selection.contenders import contenders_of, params_of
from minga.training.selection.folds import Fold, development_of, folds_of, part
from minga.training.space import Params, is_network
from minga.training.task import Split, Splits, Task, TaskReference


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every piece of work needs."""

    reference: TaskReference
    development: Split
    folds: Sequence[Fold]
    params: dict[str, Any]
    training: TrainConfig
    seed: int


def compare(
    reference: TaskReference,
    task: Task,
    splits: Splits,
    *,
    config: SelectionConfig,
    training: TrainConfig,
    params: Params,
    seed: int,
    folder: Path,
    on_progress: OnProgress = silent,
) -> Selection:
    """Compare a Task's contenders on its training and validation splits. Ray must be running.

    Args:
        reference: of the Task, which every process loads for itself.
        task: the same, loaded.
        splits: the test split is not looked at.
        config: which contenders, how many folds.
        training: epochs and patience of networks.
        params: hyper-parameters of the Task's own model.
        seed: of the folds and of all fitting.
        folder: of this comparison and no other; only reuse it with the same arguments.
        on_progress: hears of every piece of work that is done.

    Raises:
        TaskError: a contender that is named does not exist.
        DataError: there are too few examples.
        TrainingError: every contender failed.
        KeyboardInterrupt: the user stopped it; what is done is kept in `folder`.
    """
    names = _names(task, config, training)
    development = development_of(task, splits)
    folds = folds_of(task, development, num_folds=config.folds, repeats=config.repeats, seed=seed)
    work = _Work(
        reference=reference,
        development=development,
        folds=folds,
        params=dict(params),
        training=training,
        seed=seed,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with handlers_restored():
        _work_off(work, names, folder, config.max_concurrent, on_progress)
    return select(
        {
            name: [Outcome.read(_file(folder, name, fold)) for fold in range(len(folds))]
            for name in names
        },
        [fold.ratio for fold in folds],
        task.objective,
        confidence=config.confidence,
        can_federate={name: is_network(params_of(task, name, params)) for name in names},
    )


def _names(task: Task, config: SelectionConfig, training: TrainConfig) -> tuple[str, ...]:
    known = tuple(contenders_of(task, training))
    unknown = sorted(set(config.contenders) - set(known))
    if unknown:
        raise TaskError(
            f"[selection] contenders has {', '.join(unknown)}; this Task's are {', '.join(known)}"
        )
    return config.contenders or known


def _work_off(
    work: _Work, names: Sequence[str], folder: Path, max_concurrent: int, on_progress: OnProgress
) -> None:
    """Do what is missing, so many pieces at a time."""
    pieces = [(name, fold) for fold in range(len(work.folds)) for name in names]
    missing = [piece for piece in pieces if not _file(folder, *piece).exists()]
    done = len(pieces) - len(missing)
    note = f"{done} kept from before" if done else ""
    on_progress(Progress(step="compare", done=done, total=len(pieces), note=note))
    if not missing:
        return
    shared, waiting = ray.put(work), iter(missing)
    running: dict[Any, tuple[str, int]] = {}
    try:
        while True:
            while len(running) < max_concurrent and (piece := next(waiting, None)) is not None:
                running[_judge.remote(shared, *piece)] = piece
            if not running:
                return
            ended, _ = ray.wait(list(running), num_returns=1)
            name, fold = running.pop(ended[0])
            outcome: Outcome = ray.get(ended[0])
            _keep(outcome, _file(folder, name, fold))
            done += 1
            told = outcome.error or ", ".join(f"{k} {v:.4f}" for k, v in outcome.metrics.items())
            note = f"{name}, fold {fold + 1}: {told}"
            on_progress(Progress(step="compare", done=done, total=len(pieces), note=note))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{done} of {len(pieces)} fits are kept in {folder}; the same command goes on from "
            "there"
        ) from None
    finally:
        for left in running:
            ray.cancel(left, force=True)


@ray.remote(num_cpus=1, max_retries=2)  # type: ignore[untyped-decorator]
def _judge(work: _Work, name: str, fold: int) -> Outcome:
    return judge(work, work.reference.load(), name, fold)


def judge(work: _Work, task: Task, name: str, fold: int) -> Outcome:
    """Fit a contender in one fold and measure it; what goes wrong is told, not raised."""
    places = work.folds[fold]
    learn, choose, held_out = (
        part(work.development, one) for one in (places.learn, places.choose, places.judge)
    )
    try:
        contender = contenders_of(task, work.training, work.params)[name]
        start = time.perf_counter()
        model = contender.fit(learn, choose, seed=work.seed)
        seconds = time.perf_counter() - start
        metrics = measure(task, model.predict(held_out.inputs), held_out.targets)
        # The model's size hardly differs between folds, and an export takes seconds.
        size = len(exported(task, model)) if fold == 0 else 0
    except Exception as error:  # noqa: BLE001 - a contender that fails loses, the others go on
        lines = str(error).strip().splitlines() or [""]
        return Outcome(error=f"{type(error).__name__}: {lines[0]}")
    return Outcome(metrics=dict(metrics), seconds=seconds, size_bytes=size)


def _file(folder: Path, name: str, fold: int) -> Path:
    return folder / f"{name}-{fold + 1}.json"


def _keep(outcome: Outcome, file: Path) -> None:
    """Write what was done, whole or not at all."""
    with replacing(file) as unfinished:
        outcome.write(unfinished)
