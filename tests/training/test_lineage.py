"""Where a version comes from."""

import hashlib
import subprocess

import pytest

from minga.training import TaskReference
from minga.training.lineage import Campaign, trace


@pytest.fixture
def project(tmp_path, reference):
    """A folder with a Task's file."""
    (tmp_path / "task.py").write_text((reference.root / "blobs.py").read_text())
    return TaskReference(root=tmp_path, name="task.py:Blobs")


def traced(project, **facts):
    """Trace with facts that do not matter here."""
    return trace(
        project.load(),
        project,
        params={"lr": 0.1},
        seed=7,
        source="a.csv",
        data_digest="d" * 64,
        num_examples=10,
        **facts,
    )


def git(project, *words):
    """Run Git in the project as somebody."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", project.root, *identity, *words], check=True, capture_output=True)


def test_commit_and_local_changes_are_recorded(project):
    """Inside a repository the commit is known, and whether files differ from it."""
    git(project, "init")
    git(project, "add", ".")
    git(project, "commit", "-m", "first")
    clean = traced(project).code
    assert len(clean.commit) == 40
    assert not clean.dirty
    project.file.write_text(project.file.read_text() + "\n")
    assert traced(project).code.dirty


def test_without_a_repository_the_file_is_still_named(project, monkeypatch):
    """Outside of a repository the commit is empty; the Task's file is named by its digest."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.root.parent))
    code = traced(project).code
    assert code.commit == ""
    assert code.task_sha256 == hashlib.sha256(project.file.read_bytes()).hexdigest()


def test_lock_file_and_environment_are_recorded(project):
    """The project's lock file is part of the environment, and versions have one digest."""
    (project.root / "uv.lock").write_text("numpy==2\n")
    environment = traced(project).environment
    assert environment.lock_sha256 == hashlib.sha256(b"numpy==2\n").hexdigest()
    assert environment.digest == traced(project).environment.digest


def test_campaign_makes_the_origin_federated(project, tmp_path):
    """A campaign's product says so, with rounds, cohort and parent; it survives its file."""
    campaign = Campaign(name="c1", rounds=5, cohort=8)
    lineage = traced(project, campaign=campaign, parent_version=2)
    lineage.write(tmp_path / "lineage.json")
    assert type(lineage).read(tmp_path / "lineage.json") == lineage
    assert (lineage.origin, lineage.parent_version) == ("federated", 2)
    assert traced(project).origin == "central"
