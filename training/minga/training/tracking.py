"""The record of runs in MLflow, and the only module that loads it.

A `Tracker` is bound to one tracking database and one experiment; it sets no global state, so
several may live in one process. The database is SQLite unless the URI says otherwise, because
MLflow's file store is out of support.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from minga.training.history import Record
from minga.training.progress import OnProgress, Progress, silent
from minga.training.space import Params

# MLflow reads these when it is imported: nothing is to be sent anywhere, and progress is ours
# to show.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is away is asked for half a minute; MLflow's own seven tries take four in silence.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")

import mlflow.onnx
import onnx
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from onnx.helper import tensor_dtype_to_np_dtype
from sqlalchemy.exc import SQLAlchemyError

for _noisy in ("alembic", "mlflow"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

REGISTRY_ERRORS = (MlflowException, SQLAlchemyError)
"""What MLflow's client raises where its database or server does not answer as it should."""

PARENT_TAG = "mlflow.parentRunId"

QUOTED_PARENT = f"`{PARENT_TAG}`"

MAX_RUNS = 10_000
"""The most nested runs that are looked at: more than MLflow gives at once by default."""
SETTINGS = "minga.json"
"""The artifact with a run's resolved settings."""

TEST = "test_"
"""What the names of metrics on the test split begin with."""

BATCH_METRICS = 1000
"""The most values that MLflow takes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a run left behind.

    Attributes:
        tags: of the run.
        settings: the resolved settings; empty if the run kept none.
        history: one record for each epoch.
        metrics: on the test split, by the Task's names.
    """

    tags: Mapping[str, str]
    settings: dict[str, Any]
    history: tuple[Record, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Tracker:
    """Writes the runs of one experiment.

    Concurrent writers of one SQLite file are fine once the database and the experiment exist.
    """

    client: Any
    experiment_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    """On every run, nested ones too."""

    @classmethod
    def open(
        cls,
        tracking_uri: str,
        artifact_root: str,
        experiment: str,
        on_progress: OnProgress = silent,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Open the database and the experiment; both are made the first time.

        Args:
            tracking_uri: of MLflow, such as `sqlite:////path/mlflow.db`.
            artifact_root: folder or URI of new experiments' artifacts.
            experiment: its name.
            on_progress: hears of the seconds that making a database takes.
            tags: on every run that is started, such as `code_tags`.
        """
        client = connect(tracking_uri, on_progress)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return cls(client, found.experiment_id, tags or {})
        location = artifact_root
        if not urlsplit(location).scheme:
            location = (Path(location).absolute() / experiment).as_uri()
        made = client.create_experiment(experiment, artifact_location=location)
        return cls(client, made, tags or {})

    @contextmanager
    def run(
        self,
        name: str,
        *,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        kept: Path | None = None,
    ) -> Iterator[str]:
        """Open a run and give its id; it ends as finished, killed or failed.

        Args:
            name: of the run.
            tags: of the run.
            parent: the run that it is nested under.
            kept: a file that names the run until it is finished: after an interruption, a kill or
                a failure the same call goes on with the run that the file names.
        """
        run_id = self._unfinished(kept)
        if run_id is None:
            run_id = self.start(name, tags=tags, parent=parent)
        else:
            self.log(run_id, tags={**self.tags, **(tags or {})})
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(run_id, encoding="utf-8")
        try:
            yield run_id
        except KeyboardInterrupt:
            self.end(run_id, "KILLED")
            raise
        except BaseException:
            self.end(run_id, "FAILED")
            raise
        self.end(run_id, "FINISHED")
        if kept is not None:
            kept.unlink(missing_ok=True)

    def _unfinished(self, kept: Path | None) -> str | None:
        """Take the run that a file names up again; None if there is none in this experiment."""
        if kept is None or not kept.exists():
            return None
        run_id = kept.read_text(encoding="utf-8").strip()
        try:
            info = self.client.get_run(run_id).info
        except MlflowException:
            return None
        if info.experiment_id != self.experiment_id or info.lifecycle_stage != "active":
            return None
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def start(
        self, name: str, *, tags: Mapping[str, str] | None = None, parent: str | None = None
    ) -> str:
        """Start a run, nested under `parent` if given, and give its id."""
        all_tags = {**self.tags, **(tags or {})} | ({PARENT_TAG: parent} if parent else {})
        run = self.client.create_run(self.experiment_id, run_name=name, tags=all_tags)
        return str(run.info.run_id)

    def end(self, run_id: str, status: str) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def log(
        self,
        run_id: str,
        *,
        params: Params | None = None,
        history: Iterable[Record] = (),
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write all that is given with as few transactions as possible; each costs about 20 ms.

        Args:
            run_id: of the run.
            params: are written once and never changed.
            history: one record for each epoch; its number is the metrics' step.
            metrics: final ones, at step 0.
            tags: replace those of the same name.
        """
        now = int(time.time() * 1000)
        values = [
            Metric(name, value, now, int(record["epoch"]))
            for record in history
            for name, value in record.items()
            if name != "epoch"
        ]
        values += [Metric(name, value, now, 0) for name, value in (metrics or {}).items()]
        self.client.log_batch(
            run_id,
            metrics=values[:BATCH_METRICS],
            params=[Param(name, str(value)) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )
        for start in range(BATCH_METRICS, len(values), BATCH_METRICS):
            self.client.log_batch(run_id, metrics=values[start : start + BATCH_METRICS])

    def points(self, run_id: str) -> set[tuple[int, str]]:
        """Give the epochs that a run has a value of, with the value's name."""
        names = self.client.get_run(run_id).data.metrics
        return {
            (metric.step, name)
            for name in names
            for metric in self.client.get_metric_history(run_id, name)
        }

    def children(self, run_id: str) -> dict[str, str]:
        """Give the runs nested under one: name -> id."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.{QUOTED_PARENT} = '{run_id}'", max_results=MAX_RUNS
        )
        return {run.info.run_name: run.info.run_id for run in found}

    def log_settings(self, run_id: str, settings: dict[str, Any]) -> None:
        """Keep the resolved settings with a run, as its artifact `minga.json`."""
        self.client.log_dict(run_id, settings, SETTINGS)

    def read_settings(self, run_id: str) -> dict[str, Any]:
        """Read the settings that a run keeps; empty if it keeps none."""
        kept = {artifact.path for artifact in self.client.list_artifacts(run_id)}
        if SETTINGS not in kept:
            return {}
        file = self.client.download_artifacts(run_id, SETTINGS)
        settings: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        return settings

    def read(self, run_id: str) -> Recorded:
        """Read what a run left behind."""
        run = self.client.get_run(run_id)
        records: dict[int, Record] = {}
        for name in run.data.metrics:
            if not name.startswith(TEST):
                for metric in self.client.get_metric_history(run_id, name):
                    record = records.setdefault(metric.step, {"epoch": float(metric.step)})
                    record[name] = metric.value
        return Recorded(
            tags=run.data.tags,
            settings=self.read_settings(run_id),
            history=tuple(record for _, record in sorted(records.items())),
            metrics={
                name.removeprefix(TEST): value
                for name, value in run.data.metrics.items()
                if name.startswith(TEST)
            },
        )

    def log_file(self, run_id: str, name: str, data: bytes) -> None:
        """Keep bytes with a run, as its artifact of this name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            self.client.log_artifact(run_id, str(path))


def connect(tracking_uri: str, on_progress: OnProgress = silent) -> Any:
    """Give a client of a tracking database, which is made if it is a missing SQLite file."""
    scheme, separator, file = tracking_uri.partition("sqlite:///")
    if separator and not scheme and not Path(file).exists():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        on_progress(Progress(step="track", done=0, total=1, note="making the database, once"))
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_experiments(max_results=1)
        on_progress(Progress(step="track", done=1, total=1, note=f"runs are kept in {file}"))
        return client
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def save_mlflow_model(model: bytes, folder: Path) -> None:
    """Write what `mlflow.onnx.load_model` reads, with exactly the given bytes as its model."""
    proto = onnx.load_from_string(model)
    mlflow.onnx.save_model(
        proto,
        str(folder),
        signature=_signature(proto),
        # Named here, or MLflow imports the model in another process to find them.
        pip_requirements=["numpy", "onnx", "onnxruntime"],
        onnx_execution_providers=["CPUExecutionProvider"],
        # External data gets a random file name, and so other bytes each time.
        save_as_external_data=False,
    )
    (folder / "model.onnx").write_bytes(model)


def _signature(proto: onnx.ModelProto) -> Any:
    """Take names, types and shapes from the model itself; -1 stands for any length."""

    def specs(values: Iterable[onnx.ValueInfoProto]) -> Any:
        return Schema(
            [
                TensorSpec(
                    tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
                    tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim),
                    value.name,
                )
                for value in values
            ]
        )

    return ModelSignature(inputs=specs(proto.graph.input), outputs=specs(proto.graph.output))
