"""Training a run again, from what it left behind: `minga reproduce`.

The code version is checked out beside the project; configuration, seed and hyper-parameters are the
recorded ones, and the data must have the recorded digest. A fresh process trains, so nothing of
today's code is in it, and the weights are compared bit by bit; of what is no network, the exported
model. Where they differ, the first thing
that differs is named: in what went in, then epoch by epoch in what happened, then tensor by tensor
in what came out.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from minga.cluster.checkout import checked_out
from minga.cluster.errors import ReproductionError
from minga.cluster.project import Project
from minga.cluster.retraining import Job, Result
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.training.bundle import (
    ENVIRONMENT,
    LINEAGE,
    MODEL,
    WEIGHTS,
    has_weights,
    read_verdict,
)
from minga.training.document import Document
from minga.training.errors import DataError, VerdictError
from minga.training.history import Record
from minga.training.lineage import (
    Environment,
    Lineage,
    digest_of_settings,
    environment_of,
    installed_packages,
)
from minga.training.progress import OnProgress, Progress, silent
from minga.training.reference import without_reference
from minga.training.registry import Version

_SHOWN_PACKAGES = 5


class Difference(Document):
    """One thing that is not as it was."""

    what: str
    recorded: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: was {self.recorded}, is {self.now}"


class Reproduction(Document):
    """What training again came to."""

    model: str
    version: int
    run_id: str
    new_run_id: str
    """The MLflow run of the training that repeated it."""
    is_equal: bool
    """Whether the weights are the same, bit by bit."""
    recorded_sha256: str
    """Of the recorded weights, or of the model that has none."""
    now_sha256: str
    metrics: dict[str, tuple[float, float]]
    """Test metric -> what was recorded, and what the new weights reach."""
    conditions: tuple[Difference, ...]
    """What was not as it was before training began: code, packages, machine."""
    first_difference: Difference | None
    """The first thing that came out differently; None if nothing did."""

    @property
    def largest_gap(self) -> float:
        """The largest difference of a test metric."""
        return max((abs(now - before) for before, now in self.metrics.values()), default=0.0)


def reproduce(project: Project, version: Version, on_progress: OnProgress = silent) -> Reproduction:
    """Train the run behind a version again, and compare.

    Args:
        project: whose registry has the version; its folder is not changed.
        version: any version that was trained centrally.
        on_progress: hears of each part.

    Raises:
        ReproductionError: the run cannot be trained again: it is federated or trained nothing, or
            its code is gone.
        VerdictError: nobody who is trusted vouches for the record of it, or it was altered.
        DataError: its data is gone, or is not what it was.
    """
    folder = project.registry().fetch(version.name, version.version)
    # The record says which code runs here and which data it reads.
    read_verdict(folder, version.name, project.keyring)
    lineage = Lineage.read(folder / LINEAGE)
    tracker = project.tracker()
    recorded = tracker.read(version.run_id)
    require_training(version, lineage, recorded.tags)
    _require_settings(recorded.settings, lineage)
    with checked_out(project.reference, lineage.code) as (root, code_differs):
        conditions = (
            *(Difference(what=what, recorded=was, now=now) for what, was, now in code_differs),
            *_environment_differs(lineage.environment, environment_of(root)),
            *_packages_differ((folder / ENVIRONMENT).read_text(encoding="utf-8")),
        )
        for one in conditions:
            on_progress(Progress(step="rebuild", done=0, total=1, note=str(one)))
        on_progress(Progress(step="rebuild", done=1, total=1, note=f"code in {root}"))
        job = Job(
            root=str(root),
            settings=recorded.settings,
            source=_source(project, root, recorded.settings["data"]["source"]),
            data_digest=lineage.data_digest,
            params=lineage.params,
            reproduces=version.run_id,
            parent_version=lineage.parent_version,
        )
        again = _train(project, job, on_progress)
    before = _Made.read(folder)
    is_equal = before.sha256 == again.made.sha256
    names = recorded.metrics.keys() & again.result.metrics.keys()
    return Reproduction(
        model=version.name,
        version=version.version,
        run_id=version.run_id,
        new_run_id=again.result.run_id,
        is_equal=is_equal,
        recorded_sha256=before.sha256,
        now_sha256=again.made.sha256,
        metrics={n: (recorded.metrics[n], again.result.metrics[n]) for n in sorted(names)},
        conditions=conditions,
        first_difference=None
        if is_equal
        else _difference(recorded.history, again.result.history, before, again.made),
    )


def first_difference(
    recorded: Sequence[Record], now: Sequence[Record], *, before: Parameters, after: Parameters
) -> Difference:
    """Name the first thing that came out differently: by epoch, else by tensor.

    Args:
        recorded: an epoch's record each, as they were.
        now: the same of the training that repeated it.
        before: the recorded parameters.
        after: those of the training that repeated it; they differ somewhere.
    """
    for was, is_now in zip(recorded, now, strict=False):
        for name in sorted(was.keys() & is_now.keys() - {"epoch"}):
            if was[name] != is_now[name] and not np.isnan(was[name] + is_now[name]):
                what = f"epoch {int(was['epoch'])}, {name}"
                return Difference(what=what, recorded=repr(was[name]), now=repr(is_now[name]))
    if len(recorded) != len(now):
        return Difference(what="number of epochs", recorded=str(len(recorded)), now=str(len(now)))
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape != after[name].shape:
            shapes = [str(one[name].shape) if name in one else "absent" for one in (before, after)]
            return Difference(what=f"tensor {name}", recorded=shapes[0], now=shapes[1])
        is_other = before[name].reshape(-1) != after[name].reshape(-1)
        if is_other.any():
            index = int(np.argmax(is_other))
            values = [repr(float(one[name].reshape(-1)[index])) for one in (before, after)]
            what = (
                f"tensor {name}, {int(is_other.sum())} of {is_other.size} values, first at {index}"
            )
            return Difference(what=what, recorded=values[0], now=values[1])
    return Difference(what="tensors", recorded="equal in value", now="of other bits")


@dataclass(frozen=True, slots=True)
class _Made:
    """What training came to: a network's parameters, or the digest of another exported model."""

    parameters: Parameters | None
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        if not has_weights(folder):
            model = without_reference((folder / MODEL).read_bytes())
            return cls(None, hashlib.sha256(model).hexdigest())
        parameters = from_bytes((folder / WEIGHTS).read_bytes())
        ordered = to_bytes(dict(sorted(parameters.items())))
        return cls(parameters, hashlib.sha256(ordered).hexdigest())


def _difference(
    recorded: Sequence[Record], now: Sequence[Record], before: _Made, after: _Made
) -> Difference:
    if before.parameters is None or after.parameters is None:
        return Difference(what="exported model", recorded=before.sha256, now=after.sha256)
    return first_difference(recorded, now, before=before.parameters, after=after.parameters)


@dataclass(frozen=True, slots=True)
class _Again:
    result: Result
    made: _Made


def require_training(version: Version, lineage: Lineage, tags: Mapping[str, str]) -> None:
    """Refuse a version whose run did not train it.

    Args:
        version: which one.
        lineage: that it carries.
        tags: of its run.

    Raises:
        ReproductionError: it is federated, or was registered from another version.
    """
    if lineage.campaign is not None:
        raise ReproductionError(
            f"{version.name} version {version.version} is the product of federated campaign "
            f"{lineage.campaign.name}: devices kept their data, so it cannot be trained again here"
        )
    if tags.get("minga.step") != "train":
        raise ReproductionError(
            f"{version.name} version {version.version} was not trained by its run but registered "
            + (
                f"from version {lineage.parent_version}; reproduce that one"
                if lineage.parent_version
                else "with weights from elsewhere, of which no training is recorded"
            )
        )


def _require_settings(settings: Mapping[str, Any], lineage: Lineage) -> None:
    """Refuse settings that are not those which the signed lineage names.

    Raises:
        VerdictError: they are others.
    """
    known = lineage.settings_sha256
    is_same = digest_of_settings(dict(settings)) == known if known else True
    if not is_same or settings.get("task") != lineage.reference:
        raise VerdictError(
            "the settings that the run keeps were altered after the version was registered; "
            "do not train with them"
        )


def _source(project: Project, root: Path, source: str) -> str:
    """Give the recorded source; what is not in Git is taken from the project's own folder."""
    if "://" in source or (root / source).exists() or not (project.directory / source).exists():
        return source
    return str(project.directory / source)


def _train(project: Project, job: Job, on_progress: OnProgress) -> _Again:
    """Train in a fresh process, which tells of its progress line by line."""
    with tempfile.TemporaryDirectory(prefix="minga-reproduce-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        job.write(folder / "job.json")
        log = stack.enter_context((folder / "log.txt").open("w+", encoding="utf-8"))
        child = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "minga.cluster.retraining", scratch],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
                "MINGA_TRACKING_URI": project.tracking_uri,
                "MINGA_ARTIFACT_ROOT": project.artifact_root,
                "MINGA_RAY_STORAGE": str(folder / "ray"),
            },
        )
        stack.callback(_end, child)
        assert child.stdout is not None
        for line in child.stdout:
            _tell(line, on_progress)
        if child.wait() != 0:
            raise _failure(folder, log.name)
        return _Again(Result.read(folder / "result.json"), _Made.read(folder))


def _end(child: subprocess.Popen[str]) -> None:
    """End the process if this one was interrupted; it ends its own Ray."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _tell(line: str, on_progress: OnProgress) -> None:
    """Hand progress on; whatever else a Task prints is no progress."""
    try:
        on_progress(Progress(**json.loads(line)))
    except (ValueError, TypeError):
        return


def _failure(folder: Path, log: str) -> Exception:
    """Make an error of what the process left behind."""
    error = folder / "error.json"
    if error.exists():
        told: dict[str, Any] = json.loads(error.read_text(encoding="utf-8"))
        kind = DataError if told["kind"] == "DataError" else ReproductionError
        return kind(told["message"])
    lines = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return ReproductionError(f"training again failed: {lines[-1] if lines else 'it said nothing'}")


def _environment_differs(was: Environment, is_now: Environment) -> Iterator[Difference]:
    for name in ("python", "minga", "torch", "machine", "cpu"):
        before, after = getattr(was, name), getattr(is_now, name)
        if before != after:
            yield Difference(what=name, recorded=before or "not recorded", now=after)


def _packages_differ(lock: str) -> Iterator[Difference]:
    """Name the first packages whose versions differ, and how many more do."""
    was, is_now = _versions(lock), _versions(installed_packages())
    names = [
        name for name in sorted(was.keys() | is_now.keys()) if was.get(name) != is_now.get(name)
    ]
    for name in names[:_SHOWN_PACKAGES]:
        before, after = was.get(name, "not installed"), is_now.get(name, "not installed")
        yield Difference(what=f"package {name}", recorded=before, now=after)
    if len(names) > _SHOWN_PACKAGES:
        more = f"{len(names) - _SHOWN_PACKAGES} more"
        yield Difference(what="packages", recorded=more, now="other versions")


def _versions(lock: str) -> dict[str, str]:
    pairs = (line.partition("==") for line in lock.splitlines() if line)
    return {name: version for name, _, version in pairs}
