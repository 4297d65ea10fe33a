"""The training of the chosen parameters: Ray Train, on as many workers as the project says.

Every worker runs the one loop on its part of each batch, under PyTorch's DDP. An epoch leaves a
checkpoint, unless epochs are so short that checkpoints would take a notable part of the time: then
some do. A lost worker costs what was done since the last one: the others are restarted from there
and end with the very weights of an undisturbed run. With `min_workers` they need not
wait for a new machine: batches stay as large, each worker takes a larger part, and weights differ
from an undisturbed run's by rounding alone.

An interrupted training is kept in its folder; calling `train` again with that folder goes on.
"""

import contextlib
import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig

from minga.federation.durable import replacing
from minga.federation.parameters import Parameters
from minga.training.config import TrainConfig
from minga.training.errors import TrainingError, last_line
from minga.training.history import OnEpoch, Record, is_stalled, unheard
from minga.training.interrupts import handlers_restored
from minga.training.loop import Learner, Shard, fit
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.progress import OnProgress, Progress, silent
from minga.training.space import Objective, Params
from minga.training.task import Splits, Task, TaskReference
from minga.training.trainers import trainer_class

CHECKPOINT = "learner.pt"
HISTORY = "history.json"
POLL_S = 0.3
RESIZE_CHECK_S = 20.0
"""How often a shrunken training looks for machines that came back."""

CHECKPOINT_SHARE = 0.02
"""So much of the time may go into checkpoints; what Ray does with them comes on top."""

CHECKPOINT_EVERY_S = 30.0
"""But after so long the next epoch leaves one, whatever it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The network of the best epoch on the validation split.

    Attributes:
        parameters: of the complete network.
        params: the hyper-parameters it was built with.
        metrics: the best epoch's, on the validation split.
        history: one record for each epoch.
        run_id: of the MLflow run that recorded it, if one did.
        parent_version: whose weights it went on from; None if it began anew.
    """

    parameters: Parameters
    params: Params
    metrics: Mapping[str, float]
    history: tuple[Record, ...]
    run_id: str = ""
    parent_version: int | None = None


def train(
    reference: TaskReference,
    task: Task,
    splits: Splits,
    params: Params,
    *,
    config: TrainConfig,
    seed: int,
    folder: Path,
    start: Parameters | None = None,
    on_progress: OnProgress = silent,
    on_epoch: OnEpoch = unheard,
) -> Trained:
    """Train with given parameters. Ray must be running.

    The same arguments give the same weights, bit by bit, on the same kind of machine, unless
    workers were lost for good (`min_workers`).

    Args:
        reference: of the Task, which every worker loads for itself.
        task: the same, loaded.
        splits: travel to the workers through Ray's object store.
        params: complete hyper-parameters.
        config: how many workers and epochs, and how often lost workers are replaced.
        seed: of the first weights and of the order of examples.
        folder: of this training and no other; only reuse it with the same arguments.
        start: parameters to go on from, of a network of the same shape; without them the first
            weights are drawn. The preparation is among them, and stays what it was fitted to.
        on_progress: hears of every epoch.
        on_epoch: gets every epoch's record, those of an interrupted training once more.

    Raises:
        TrainingError: Ray has too few CPUs or GPUs, or training failed more often than it may.
        KeyboardInterrupt: the user stopped it; its checkpoints are kept in `folder`.
    """
    use_gpu = _use_gpu(config)
    trainer = trainer_class(num_workers_vary=bool(config.min_workers))(
        _work,
        train_loop_config={
            "reference": reference,
            "splits": ray.put(splits),
            "start": None if start is None else ray.put(start),
            "params": dict(params),
            "config": config,
            "seed": seed,
            "history": str(folder / HISTORY),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.num_workers)
            if config.min_workers
            else config.num_workers,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
        ),
        run_config=_run_config(task, config, folder),
    )
    reporting = _reporting(folder / HISTORY, config.epochs, on_progress, on_epoch)
    try:
        with reporting, handlers_restored():
            result = trainer.fit()
        trained = _read_best(result, task, splits, params, seed)
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"training failed: {last_line(error)}") from error
    except (SystemExit, KeyboardInterrupt):
        # Ray makes a SystemExit of Ctrl-C, once it has stopped the workers; before it listens and
        # after it is done Ctrl-C is what it always is.
        raise KeyboardInterrupt(
            f"checkpoints are kept in {folder}; the same command goes on from there"
        ) from None
    shutil.rmtree(folder, ignore_errors=True)
    return trained


def _run_config(task: Task, config: TrainConfig, folder: Path) -> RunConfig:
    return RunConfig(
        name=folder.name,
        storage_path=str(folder.parent),
        failure_config=FailureConfig(max_failures=config.max_failures),
        # The latest is kept as well, whatever it scores: training goes on from it.
        checkpoint_config=CheckpointConfig(
            num_to_keep=config.keep_checkpoints,
            checkpoint_score_attribute=task.objective.metric,
            checkpoint_score_order=task.objective.mode,
        ),
        logging_config=LoggingConfig(log_level="ERROR"),
    )


def _work(settings: dict[str, Any]) -> None:
    """Train as one worker; only the first one validates, the others wait for its report."""
    context = ray.train.get_context()
    shard = Shard(rank=context.get_world_rank(), num_workers=context.get_world_size())
    config: TrainConfig = settings["config"]
    splits: Splits = ray.get(settings["splits"])
    task: Task = settings["reference"].load()
    start: Parameters | None = None if settings["start"] is None else ray.get(settings["start"])
    learner = _learner(task, settings["params"], splits, config, seed=settings["seed"], start=start)
    is_first = shard.rank == 0
    best = _Best(task.objective, learner)
    saving = _Saving()

    def is_over() -> bool:
        return is_stalled(
            learner.history, task.objective, patience=config.patience, min_gain=config.min_gain
        )

    def report(record: Record) -> bool:
        if is_first:
            best.note(record)
            _write_history(learner.history, Path(settings["history"]))
        over, due = _agree(is_over(), record["epoch"] == config.epochs or saving.is_due, shard)
        if over or due:
            saving.report(record, {**learner.state(), "best": best.state} if is_first else None)
        return over

    if is_over():
        return
    fit(
        learner,
        splits.train,
        epochs=config.epochs,
        seed=settings["seed"],
        validation=splits.validation if is_first else None,
        shard=shard,
        on_epoch=report,
    )


class _Best:
    """The weights of the best epoch so far; of the last one while none has the metric."""

    def __init__(self, objective: Objective, learner: Learner) -> None:
        self._objective = objective
        self._learner = learner
        self._value = math.nan
        self.state: dict[str, Any] = {}
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            self.state = _read(checkpoint)["best"]
            record = learner.history[self.state["epoch"] - 1]
            self._value = record.get(objective.metric, math.nan)

    def note(self, record: Record) -> None:
        """Keep an epoch's weights if none before it is better; see `history.best_record`."""
        value = record.get(self._objective.metric, math.nan)
        is_better = math.isfinite(value) and not self._objective.gain(value, self._value) < 0
        if not is_better and math.isfinite(self._value):
            return
        self._value = value if math.isfinite(value) else math.nan
        network = self._learner.bare_network.state_dict()
        weights = {name: tensor.clone() for name, tensor in network.items()}
        self.state = {"epoch": int(record["epoch"]), "network": weights}


class _Saving:
    """When a checkpoint is due: as often as its share of the time allows."""

    def __init__(self) -> None:
        self._at, self._wait_s = -math.inf, 0.0

    @property
    def is_due(self) -> bool:
        """Whether this epoch is to leave one."""
        return time.monotonic() - self._at >= self._wait_s

    def report(self, record: Record, state: dict[str, Any] | None) -> None:
        """Report an epoch, which all workers do together; the first one saves the state."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as saved:
            if state is not None:
                torch.save(state, Path(saved) / CHECKPOINT)
            checkpoint = None if state is None else Checkpoint.from_directory(saved)
            ray.train.report(dict(record), checkpoint=checkpoint)
        self._at = time.monotonic()
        self._wait_s = min((self._at - began) / CHECKPOINT_SHARE, CHECKPOINT_EVERY_S)


def _learner(
    task: Task,
    params: Params,
    splits: Splits,
    config: TrainConfig,
    *,
    seed: int,
    start: Parameters | None,
) -> Learner:
    """Make the learner, or restore it from the last checkpoint, and wrap it for several workers."""
    device = ray.train.torch.get_device()
    network = build_network(task, params, splits.train, seed=seed)
    if start is not None:
        load_parameters(network, start)
    network = network.to(device)
    mixed = config.precision == "mixed" and device.type == "cuda"
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    learner = Learner(task, network, params, half=half if mixed else None)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        learner.load(_read(checkpoint))
    if ray.train.get_context().get_world_size() > 1:
        learner.network = ray.train.torch.prepare_model(learner.network)
    return learner


def _agree(over: bool, due: bool, shard: Shard) -> tuple[bool, bool]:
    """Give the first worker's answers to all: only that one has validated, and has a clock."""
    if shard.num_workers == 1:
        return over, due
    told = torch.tensor([over, due], dtype=torch.uint8, device=ray.train.torch.get_device())
    torch.distributed.broadcast(told, src=0)
    over, due = (bool(answer) for answer in told.tolist())
    return over, due


def _write_history(history: Sequence[Record], file: Path) -> None:
    """Put the history where the driver looks, whole or not at all."""
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(history), encoding="utf-8")


def _read_best(result: Any, task: Task, splits: Splits, params: Params, seed: int) -> Trained:
    """Read the weights of the best epoch, and the history: the last checkpoint has both."""
    state = _read(result.checkpoint)
    best, history = state["best"], state["history"]
    network = build_network(task, params, splits.train, seed=seed)
    network.load_state_dict(best["network"])
    task.finish(network, splits.validation)
    record = history[best["epoch"] - 1]
    return Trained(
        parameters=parameters_of(network),
        params=dict(params),
        metrics={name: value for name, value in record.items() if name != "epoch"},
        history=tuple(history),
    )


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as saved:
        file = Path(saved) / CHECKPOINT
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _use_gpu(config: TrainConfig) -> bool:
    """Decide what the workers compute on.

    Raises:
        TrainingError: Ray has too few of it; training would wait for ever.
    """
    fewest = config.min_workers or config.num_workers
    name = "min_workers" if config.min_workers else "num_workers"
    resources = ray.cluster_resources()
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    use_gpu = config.device == "gpu" or (config.device == "auto" and num_gpus >= config.num_workers)
    if use_gpu and num_gpus < fewest:
        raise TrainingError(
            f'training.device = "gpu" and training.{name} = {fewest} but Ray has {num_gpus} GPUs; '
            'ask for fewer workers, or for device = "cpu"'
        )
    if num_cpus < fewest:
        raise TrainingError(
            f"training.{name} = {fewest} but Ray has {num_cpus} CPUs; ask for fewer workers"
        )
    return use_gpu


@contextlib.contextmanager
def _reporting(
    file: Path, epochs: int, on_progress: OnProgress, on_epoch: OnEpoch
) -> Iterator[None]:
    """Report every epoch that the first worker notes, while this thread waits for the workers."""
    on_progress(Progress(step="train", done=0, total=epochs, note="starting workers"))
    ended = threading.Event()
    num_seen = 0

    def look() -> None:
        nonlocal num_seen
        history: list[Record] = json.loads(file.read_bytes()) if file.exists() else []
        for record in history[num_seen:]:
            note = ", ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "epoch")
            on_progress(Progress(step="train", done=int(record["epoch"]), total=epochs, note=note))
            on_epoch(record)
        num_seen = max(num_seen, len(history))

    def watch() -> None:
        while not ended.wait(POLL_S):
            look()

    watcher = threading.Thread(target=watch, name="minga-train-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()
