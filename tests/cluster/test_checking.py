"""What a run says of the code and the data that it is of."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from minga.cli.app import main
from minga.cluster.project import load

VIRTUAL = Path(__file__).parents[1] / "training" / "tasks" / "virtual.py"
TASK = """
from virtual import Dense


class Viewed(Dense):
    def data(self, source):
        return super().data("1")
"""
TABLES = """
task = "task.py:Viewed"
[data]
source = "both.view.toml"
[federation]
num_rounds = 1
protection = "plain"
[simulation]
workers = 1
[simulation.partition]
name = "iid"
devices = 5
"""
VIEW = '[[source]]\nname = "a"\nuri = "a.csv"\n[[source]]\nname = "b"\nuri = "b.csv"\nkey = ["k"]\n'
RECORD = "outs:\n- md5: {md5}\n  size: {size}\n  hash: md5\n  path: {path}\n"


def git(folder, *words):
    """Run Git and give what it says."""
    who = ("-c", "user.name=n", "-c", "user.email=a@b.c")
    return subprocess.check_output(("git", "-C", str(folder), *who, *words), text=True).strip()


@pytest.fixture
def project(tmp_path, with_database):
    """A project in Git whose view is of two files that DVC tracks; one record is not committed."""
    (tmp_path / "minga.toml").write_text(TABLES)
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "both.view.toml").write_text(VIEW)
    (tmp_path / ".gitignore").write_text(".minga\n__pycache__\n*.csv\n")
    shutil.copy(VIRTUAL, tmp_path)
    for name in ("a.csv", "b.csv"):
        content = f"k,{name[0]}\n1,2\n".encode()
        (tmp_path / name).write_bytes(content)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        record = RECORD.format(md5=md5, size=len(content), path=name)
        (tmp_path / f"{name}.dvc").write_text(record)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "reset", "-q", "b.csv.dvc")
    git(tmp_path, "commit", "-qm", "all but one")
    return with_database(tmp_path)


def test_runs_name_their_code_and_their_data(project, capsys):
    """A run has the commit, whether the tree was dirty, and what DVC calls each of its sources.

    MLflow's own tags say the same, so that its pages show the commit.
    """

    def tags():
        with pytest.raises(SystemExit) as left:
            main(["simulate", "--fresh", "--project", str(project), "--json"])
        said = capsys.readouterr()
        assert not left.value.code, said.err
        return load(project).tracker().client.get_run(json.loads(said.out)["run_id"]).data.tags

    commit = git(project, "rev-parse", "HEAD")
    first = tags()
    assert (first["minga.git_commit"], first["mlflow.source.git.commit"]) == (commit, commit)
    assert (first["minga.git_dirty"], first["mlflow.source.git.dirty"]) == ("true", "true")
    digests = [
        hashlib.md5((project / name).read_bytes()).hexdigest() for name in ("a.csv", "b.csv")
    ]
    assert first["minga.dvc_md5"] == ", ".join(digests)
    assert first["minga.dvc_commit"] == f"{commit}, -"
    git(project, "add", ".")
    git(project, "commit", "-qm", "the other")
    second, later = tags(), git(project, "rev-parse", "HEAD")
    assert (second["minga.git_commit"], second["minga.git_dirty"]) == (later, "false")
    assert second["minga.dvc_commit"] == f"{commit}, {later}"
    assert second["minga.data_sha256"] == first["minga.data_sha256"]
