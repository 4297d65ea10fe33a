"""A training that repeats another, in a process of its own: `python -m minga.cluster.retraining`.

Its folder holds `job.json`; it leaves `result.json` and the weights there (of what is no network,
the exported model), or `error.json`. Each line that it writes to stdout is one step of progress.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minga.cluster.project import Project, restore
from minga.federation.parameters import to_bytes
from minga.training.document import Document
from minga.training.errors import DataError, TrainingError
from minga.training.history import Record
from minga.training.progress import Progress
from minga.training.space import Param

WEIGHTS = "weights.safetensors"
MODEL = "model.onnx"


class Job(Document):
    """What is to be trained, all of it recorded."""

    root: str
    """The project folder, in the version of then."""
    settings: dict[str, Any]
    """The resolved `minga.toml`."""
    source: str
    data_digest: str
    params: dict[str, Param]
    reproduces: str
    """The run that is repeated."""
    parent_version: int | None = None
    """The version whose weights it went on from."""


class Result(Document):
    """What came of it."""

    run_id: str
    history: tuple[Record, ...]
    metrics: dict[str, float]
    """On the test split."""


def retrain(job: Job, folder: Path) -> None:
    """Train, and leave weights and result in the folder.

    Raises:
        DataError: the data is gone, or is not what it was.
        TrainingError: training failed.
    """
    from minga.cluster import pipeline  # noqa: PLC0415 - after the settings are known to be sound
    from minga.cluster.learning import Fitted  # noqa: PLC0415
    from minga.training.evaluate import measure_with_loss  # noqa: PLC0415
    from minga.training.models import exported  # noqa: PLC0415

    project = restore(job.settings, Path(job.root), source=job.source)
    _require_data(project, job)
    parent = None
    if job.parent_version is not None:
        parent = pipeline.parent_of(project, job.parent_version)
    trained = pipeline.train(project, job.params, _tell, parent=parent)
    tags = {"mlflow.runName": "reproduce", "minga.reproduces": job.reproduces}
    project.tracker().log(trained.run_id, tags=tags)
    history: tuple[Record, ...] = ()
    if isinstance(trained, Fitted):
        (folder / MODEL).write_bytes(exported(project.loaded_task, trained.model))
        test = project.splits.test
        outputs = trained.model.predict(test.inputs)
        metrics = measure_with_loss(project.loaded_task, outputs, test)
    else:
        (folder / WEIGHTS).write_bytes(to_bytes(trained.parameters))
        history = trained.history
        metrics = pipeline.evaluate(project, trained.parameters, trained.params)
    result = Result(run_id=trained.run_id, history=history, metrics=metrics)
    result.write(folder / "result.json")


def _require_data(project: Project, job: Job) -> None:
    try:
        digest = project.data_digest
    except DataError as error:
        raise DataError(
            f"the run's data (sha256 {job.data_digest[:12]}...) is missing: {error}; "
            "bring it back, for instance with: dvc checkout"
        ) from error
    if digest != job.data_digest:
        raise DataError(
            f"the data of {project.source} is not what it was: sha256 {digest[:12]}..., recorded "
            f"{job.data_digest[:12]}...; bring back the version of then, for instance with: "
            "dvc checkout"
        )


def _tell(progress: Progress) -> None:
    sys.stdout.write(json.dumps(asdict(progress)) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do the job of the folder that the command line names."""
    folder = Path(sys.argv[1])
    try:
        retrain(Job.read(folder / "job.json"), folder)
    except (TrainingError, ValueError) as error:
        kind = "DataError" if isinstance(error, DataError) else type(error).__name__
        told = json.dumps({"kind": kind, "message": str(error)})
        (folder / "error.json").write_text(told, encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    main()
