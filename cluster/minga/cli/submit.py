"""`minga submit` and `minga job`: a project's work on a Ray cluster."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from minga.cli.output import print_json, print_line, print_note, print_table

if TYPE_CHECKING:
    from minga.cluster.submission import Cluster, Job

app = App(name="job", help="List, follow and cancel jobs on a Ray cluster.")


def submit(
    verb: Literal["run", "tune", "train", "simulate"] = "run",
    *words: Annotated[str, Parameter(allow_leading_hyphen=True)],
    project: Path = Path(),
    address: str = "",
    detach: bool = False,
) -> None:
    """Run a command on a Ray cluster: send it there, follow it, and end with its exit code.

    The project folder and the code of this Minga travel; keys, .minga/ and what .gitignore names
    do not. Ctrl-C cancels the job; submitted again, it goes on from there.

    Example: minga submit run --fresh --address http://127.0.0.1:8265

    Args:
        verb: The command: `minga run`, `tune`, `train` or `simulate`.
        words: More words of that command, such as --fresh.
        project: The project folder.
        address: The cluster's dashboard; by default MINGA_RAY_DASHBOARD.
        detach: Print the job's id and leave; see `minga job logs`.
    """
    from minga.cluster.project import load

    loaded = load(project)
    cluster = _cluster(address)
    job_id = cluster.submit(loaded, verb, list(words))
    if detach:
        print_line(job_id)
        return
    print_note(f"job {job_id} on {_address(address)}; Ctrl-C cancels it")
    _follow(cluster, job_id, cancel=True)


@app.command(name="list")
def list_jobs(*, address: str = "", json: bool = False) -> None:
    """List the jobs that a cluster still knows, the latest first.

    Example: minga job list

    Args:
        address: The cluster's dashboard; by default MINGA_RAY_DASHBOARD.
        json: Print JSON.
    """
    jobs = _cluster(address).jobs()
    if json:
        print_json([_fields(job) for job in jobs])
        return
    rows = [(job.id, job.status, job.command) for job in jobs]
    print_table(("job", "status", "command"), rows, empty="no job yet; send one: minga submit")


@app.command
def logs(job: str, *, address: str = "") -> None:
    """Show what a job has written, follow it to its end, and end with its exit code.

    Ctrl-C stops following; the job goes on.

    Example: minga job logs raysubmit_2bT4dGq7Xn1fVhWc

    Args:
        job: The job's id, as `minga job list` shows it.
        address: The cluster's dashboard; by default MINGA_RAY_DASHBOARD.
    """
    _follow(_cluster(address), job, cancel=False)


@app.command
def cancel(job: str, *, address: str = "", json: bool = False) -> None:
    """Stop a job; submitted again, its work goes on from there.

    Example: minga job cancel raysubmit_2bT4dGq7Xn1fVhWc

    Args:
        job: The job's id, as `minga job list` shows it.
        address: The cluster's dashboard; by default MINGA_RAY_DASHBOARD.
        json: Print JSON.
    """
    ended = _cluster(address).cancel(job)
    if json:
        print_json(_fields(ended))
    else:
        print_line(f"job {ended.id}: {ended.status}")


def _follow(cluster: "Cluster", job_id: str, *, cancel: bool) -> None:
    """Write what a job writes, and leave with its exit code."""
    from minga.cluster.errors import SubmissionError
    from minga.cluster.submission import exit_code_of

    try:
        job = cluster.follow(job_id, sys.stdout.write)
    except (KeyboardInterrupt, SystemExit):
        if not cancel:
            raise KeyboardInterrupt(f"job {job_id} goes on") from None
        cluster.cancel(job_id)
        raise KeyboardInterrupt(
            f"job {job_id} is cancelled; what it has done is kept, and submitted again it goes on"
        ) from None
    sys.stdout.flush()
    if job.status == "FAILED" and job.exit_code is None:
        raise SubmissionError(f"job {job_id} failed before it began: {job.message}")
    if code := exit_code_of(job):
        print_note(f"job {job_id}: {job.status}, exit code {code}")
    sys.exit(code)


def _fields(job: "Job") -> dict[str, object]:
    return {name: getattr(job, name) for name in ("id", "status", "command", "exit_code")}


def _address(address: str) -> str:
    from minga.cluster.settings import Settings

    return address or Settings().ray_dashboard


def _cluster(address: str) -> "Cluster":
    from minga.cluster.submission import Cluster

    return Cluster(_address(address))
