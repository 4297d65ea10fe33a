"""A project's work on a Ray cluster, sent there through Ray Jobs.

What travels is the project folder, without what Minga keeps in it, keys, and what `.gitignore`
names; and the code of this Minga, as a wheel would hold it but without its requirements: those are
the cluster's. Ray installs a wheel with all its requirements anew on each machine, so the code
travels as folders.

What the job makes, it writes where the cluster and this machine both see it: to the tracking
database, the artifacts and the storage of unfinished work that the environment names. A cluster on
this very machine uses the project's own, and its signing key.
"""

import asyncio
import contextlib
import logging
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import psutil

from minga.cluster.errors import SubmissionError
from minga.cluster.project import Project
from minga.cluster.settings import Settings
from minga.inference.uris import redacted

Verb = Literal["run", "tune", "train", "simulate"]

KEPT_BACK: Final = [
    "/.minga/", "/devices/", "/coordinator/", ".git/", ".venv/", "__pycache__/",
    "*.key", "*.pem", ".env",
]  # fmt: skip
"""What never travels: what Minga keeps, what identities are made of, what is made anew."""

SHARED: Final = ("tracking_uri", "artifact_root", "ray_storage")
"""Settings that name what the cluster and this machine both must see."""

COMMAND: Final = "minga.command"
"""Under this name a job's command is in its metadata."""

# The folder that a job starts in may be unpacked anew under it, which leaves it without a current
# folder; its path stays good. See docs/decisions/0016-jobs-ship-code-as-folders.md.
ENTRYPOINT: Final = 'folder=$PWD; cd / && exec {python} -P -m minga.cli {verb} --project "$folder"'

HEAD: Final = "gcs_server"
SESSION: Final = "--session-dir="
"""A process of this name runs on a Ray cluster's head; so is it told the cluster's folder."""

PACKAGE: Final = "minga"
SQLITE: Final = "sqlite:///"
STOPPED_BY_USER: Final = 130
POLL_S: Final = 0.5
READY_S: Final = 60.0
NOT_READY: Final = "No available agent"
"""What a cluster says for some seconds after its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job on a cluster; `exit_code` is None until it has ended by itself."""

    id: str
    status: str
    command: str
    message: str
    exit_code: int | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """The jobs of one Ray cluster."""

    def __init__(self, address: str) -> None:
        """Connect to a cluster.

        Args:
            address: of its dashboard, such as `http://127.0.0.1:8265`.

        Raises:
            SubmissionError: nobody answers there, or it refuses the token.
        """
        from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 - takes a second

        self._address = address
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SubmissionError(
                f"no Ray cluster at {address}: {reason}; start one with: ray start --head, or name "
                "its dashboard with --address"
            ) from error

    @cached_property
    def is_here(self) -> bool:
        """Whether the head is on this machine: a tunnel to another one may end here as well."""
        if urlsplit(self._address).hostname not in ("127.0.0.1", "localhost", "::1"):
            return False
        version = self._ask(self._client._do_request, "GET", "/api/version").json()
        return any(
            folder.name == version["session_name"] and folder.is_dir() for folder in _sessions()
        )

    def submit(self, project: Project, verb: Verb, words: list[str]) -> str:
        """Send a command on a project to the cluster and give the job's id.

        Args:
            project: whose folder travels.
            verb: the command.
            words: more of its words, such as `--fresh`.

        Raises:
            SubmissionError: the cluster cannot write to where results are kept, or refuses the job.
        """
        python = sys.executable if self.is_here else "python3"
        entrypoint = ENTRYPOINT.format(python=shlex.quote(python), verb=verb)
        with _code() as modules:
            environment = {
                "working_dir": str(project.directory),
                "py_modules": [str(module) for module in modules],
                "excludes": KEPT_BACK,
                "env_vars": self._settings(project),
            }
            return str(
                self._ask(
                    self._client.submit_job,
                    entrypoint=f"{entrypoint} {shlex.join(words)}",
                    runtime_env=environment,
                    metadata={"minga.task": project.task, COMMAND: shlex.join([verb, *words])},
                )
            )

    def jobs(self) -> list[Job]:
        """Give all jobs that the cluster still knows, the latest first."""
        found = [job for job in self._ask(self._client.list_jobs) if job.submission_id]
        found.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [_job(job) for job in found]

    def job(self, job_id: str) -> Job:
        """Give one job.

        Raises:
            SubmissionError: the cluster does not know it.
        """
        return _job(self._ask(self._client.get_job_info, job_id))

    def follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        """Hand on what a job writes until it has ended.

        Raises:
            SubmissionError: the cluster does not know it, or does not answer any more.
        """
        self.job(job_id)

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                write(text)

        with contextlib.suppress(RuntimeError):  # the connection broke: the status tells
            asyncio.run(tail())
        while not (job := self.job(job_id)).has_ended:
            time.sleep(POLL_S)
        return job

    def cancel(self, job_id: str) -> Job:
        """Stop a job and wait until it has ended; what it has done is kept."""
        self._ask(self._client.stop_job, job_id)
        while not (job := self.job(job_id)).has_ended:
            time.sleep(POLL_S)
        return job

    def _settings(self, project: Project) -> dict[str, str]:
        """Give the environment of the job: where it works, and where its results go."""
        own = Settings()
        given = {name: str(getattr(own, name)) for name in SHARED}
        if not self.is_here:
            self._require_reachable(given)
        else:
            given = {
                "tracking_uri": _absolute(project.tracking_uri),
                "artifact_root": _absolute(project.artifact_root),
                "ray_storage": str(project.ray_storage.absolute()),
                "signing_key": str(project.signing_key_file.absolute()),
            }
        _require_no_passwords(given)
        settings = {_variable(name): value for name, value in given.items()}
        return settings | {
            "MINGA_RAY_ADDRESS": "auto",
            # Reports wait for the next health check; 2 s by default.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "PYTHONUNBUFFERED": "1",
        }

    def _require_reachable(self, given: Mapping[str, str]) -> None:
        """Refuse places that other machines cannot write to."""
        missing = [_variable(name) for name, value in given.items() if not value]
        if missing:
            raise SubmissionError(
                f"the cluster at {self._address} cannot write into this folder; set "
                f"{', '.join(missing)} to what its machines and this one see"
            )

    def _ask(self, call: Callable[..., Any], *words: Any, **settings: Any) -> Any:
        """Ask the cluster; one that has just started is given time to get ready."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                return call(*words, **settings)
            except (ConnectionError, RuntimeError, ValueError) as error:
                if NOT_READY in str(error) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    continue
                lines = [line for line in str(error).strip().splitlines() if line.strip()]
                reason = lines[-1] if lines else type(error).__name__
                raise SubmissionError(
                    f"the cluster at {self._address} refused: {reason}"
                ) from error


def _require_no_passwords(given: Mapping[str, str]) -> None:
    """Refuse passwords: the dashboard shows a job's settings to every user of its machine."""
    secret = [_variable(name) for name, value in given.items() if redacted(value) != value]
    if secret:
        raise SubmissionError(
            f"{', '.join(secret)} holds a password, which the cluster's dashboard would show; "
            "leave it out, and give it to both sides in another way, such as "
            "MLFLOW_TRACKING_PASSWORD or PGPASSWORD"
        )


def _sessions() -> Iterator[Path]:
    """Find the folders of the Ray clusters whose head runs on this machine."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != HEAD:
            continue
        for word in process.info["cmdline"] or ():
            if word.startswith(SESSION):
                yield Path(word.removeprefix(SESSION))


def exit_code_of(job: Job) -> int:
    """Give the code with which the command that waits for a job should end."""
    if job.status == "STOPPED":
        return STOPPED_BY_USER
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.status == "SUCCEEDED" else 1


@contextlib.contextmanager
def _code() -> Iterator[list[Path]]:
    """Put this Minga's code together from its source roots: `minga/` and what names its version."""
    import minga  # noqa: PLC0415 - the namespace as a whole, wherever its parts are

    own = distribution(PACKAGE)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / PACKAGE
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for part in (part for root in minga.__path__ for part in Path(root).iterdir()):
            # Of two installations the first is what Python imports: it is not mixed with the other.
            if part.is_dir() and not (package / part.name).exists():
                shutil.copytree(part, package / part.name, ignore=ignored)
        label = Path(scratch) / f"{PACKAGE}-{own.version}.dist-info"
        label.mkdir()
        label.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {own.version}\n", encoding="utf-8"
        )
        yield [package, label]


def _variable(name: str) -> str:
    return f"MINGA_{name.upper()}"


def _absolute(place: str) -> str:
    """Give a folder, or the URI of a SQLite file, as it is from anywhere on this machine."""
    if place.startswith(SQLITE):
        return SQLITE + str(Path(place.removeprefix(SQLITE)).absolute())
    return place if "://" in place else str(Path(place).absolute())


def _job(found: Any) -> Job:
    fields: Mapping[str, Any] = found.model_dump() if hasattr(found, "model_dump") else vars(found)
    return Job(
        id=str(fields["submission_id"]),
        status=str(getattr(fields["status"], "value", fields["status"])),
        command=str((fields["metadata"] or {}).get(COMMAND) or fields["entrypoint"]),
        message=str(fields["message"] or ""),
        exit_code=fields.get("driver_exit_code"),
    )
