"""Where a version comes from: data, code, environment, parameters, parent."""

import contextlib
import hashlib
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from minga.training.data.versions import DataVersion
from minga.training.document import Document
from minga.training.git import GitError, git
from minga.training.space import Param, Params
from minga.training.task import Task, TaskReference
from minga.training.uris import PublicUri


class Code(Document):
    """The project's state in Git."""

    commit: str = ""
    """Empty outside of a repository."""
    dirty: bool = False
    task_sha256: str
    """Of the Task's file."""


class Environment(Document):
    """What the numbers were computed with."""

    digest: str
    """SHA-256 of the lock: names and versions of all installed distributions."""
    lock_sha256: str = ""
    """Of the project's own lock file, if it has one."""
    python: str
    minga: str
    torch: str
    machine: str
    cpu: str = ""
    """The processor's name and the instruction set that torch computes with: another one may round
    otherwise."""


class Campaign(Document):
    """The federated campaign that a version is the product of."""

    name: str
    rounds: int
    cohort: int
    """Devices in the last round's sum."""
    num_examples: int = 0
    """Examples behind the last round's updates."""
    evaluations: dict[int, dict[str, float]] = Field(default_factory=dict)
    """Round -> what its model came to on the devices' own data, as means over them."""


class Lineage(Document):
    """Everything needed to say where a version comes from, and to train it again."""

    task: str
    reference: str
    origin: Literal["central", "federated"]
    params: dict[str, Param]
    seed: int
    source: PublicUri
    data_digest: str
    data_versions: tuple[DataVersion, ...] = ()
    """Of the files behind the source, as the disk and DVC name them."""
    num_examples: int
    code: Code
    environment: Environment
    settings_sha256: str = ""
    """Of the settings that the run keeps; empty in versions that knew none."""
    parent_version: int | None = None
    campaign: Campaign | None = None
    created_at: str


LOCK_FILES = ("uv.lock", "poetry.lock", "pdm.lock", "constraints.txt", "requirements.txt")


def trace(
    task: Task,
    reference: TaskReference,
    *,
    params: Params,
    seed: int,
    source: str,
    data_digest: str,
    data_versions: tuple[DataVersion, ...] = (),
    num_examples: int,
    settings_sha256: str = "",
    parent_version: int | None = None,
    campaign: Campaign | None = None,
) -> Lineage:
    """Record where a version comes from, as of now."""
    return Lineage(
        task=task.name,
        reference=reference.name,
        origin="federated" if campaign else "central",
        params=dict(params),
        seed=seed,
        source=source,
        data_digest=data_digest,
        data_versions=data_versions,
        num_examples=num_examples,
        settings_sha256=settings_sha256,
        code=code_of(reference),
        environment=environment_of(reference.root),
        parent_version=parent_version,
        campaign=campaign,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def digest_of_settings(settings: dict[str, Any]) -> str:
    """Name settings that a run keeps by a SHA-256; empty if it keeps none."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() if settings else ""


def code_of(reference: TaskReference) -> Code:
    """Describe the project's state in Git, as of now."""
    task_sha256 = _sha256(reference.file)
    try:
        commit = git(reference.root, "rev-parse", "HEAD")
        dirty = bool(git(reference.root, "status", "--porcelain", "--", "."))
    except GitError:
        return Code(task_sha256=task_sha256)
    return Code(commit=commit, dirty=dirty, task_sha256=task_sha256)


def code_tags(code: Code) -> dict[str, str]:
    """Say to a run of MLflow what code it is of, under MLflow's own names too."""
    if not code.commit:
        return {"minga.task_sha256": code.task_sha256}
    dirty = str(code.dirty).lower()
    return {
        "minga.task_sha256": code.task_sha256,
        "minga.git_commit": code.commit,
        "minga.git_dirty": dirty,
        "mlflow.source.git.commit": code.commit,
        "mlflow.source.git.dirty": dirty,
    }


def installed_packages() -> str:
    """Write all installed distributions as a lock file that pip reads: `name==version`, sorted."""
    names = {f"{found.name}=={found.version}" for found in distributions()}
    return "\n".join(sorted(names, key=str.lower)) + "\n"


def environment_of(root: Path) -> Environment:
    """Describe what this process computes with.

    Args:
        root: the project folder, whose lock file is looked for.
    """
    lock = next((root / name for name in LOCK_FILES if (root / name).is_file()), None)
    return Environment(
        digest=hashlib.sha256(installed_packages().encode()).hexdigest(),
        lock_sha256=_sha256(lock) if lock else "",
        python=platform.python_version(),
        minga=version("minga"),
        torch=version("torch"),
        machine=platform.machine(),
        cpu=_cpu(),
    )


def _cpu() -> str:
    """Name the processor and the instruction set that torch chose on it."""
    import torch

    name = platform.processor() or "unknown processor"
    with contextlib.suppress(OSError):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
