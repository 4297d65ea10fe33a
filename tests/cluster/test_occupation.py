"""One command at a time works in a project."""

import subprocess
import sys

import pytest

from minga.cluster import template
from minga.cluster.errors import BusyError
from minga.cluster.occupation import occupied
from minga.cluster.project import load

HOLDER = """
import sys
from minga.cluster.occupation import occupied
from minga.cluster.project import load

with occupied(load(sys.argv[1])):
    print("working", flush=True)
    sys.stdin.read()
"""


def test_second_command_is_refused(tmp_path, capsys):
    """While one process works another is told which it is; when that one is killed, it may."""
    from minga.cli.app import main

    template.write(tmp_path / "plant")
    project = load(tmp_path / "plant")
    words = [sys.executable, "-c", HOLDER, str(project.directory)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "working\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} searches, trains or"):
            occupied(project).__enter__()
        for command in ("run", "simulate"):
            with pytest.raises(SystemExit) as left:
                main([command, "--project", str(project.directory)])
            assert left.value.code == 42
            assert f"process {holder.pid}" in capsys.readouterr().err
        holder.kill()
    with occupied(project), occupied(project):
        pass
