"""Commands of the central path as users run them: messages, exit codes, stdout."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minga.cli.app import main

TASKS = Path(__file__).parents[1] / "training" / "tasks"
SOUND = 'task = "blobs.py:Blobs"\n[data]\nsource = "1"\n'


def minga(*words, cwd=None):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "minga.cli", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def minga_here(*words, cwd):
    """Run a command in this process, which has loaded what it needs; a new one takes seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture
def project(tmp_path):
    """Writes a project around the Tasks of the tests."""

    def write(text=SOUND):
        (tmp_path / "minga.toml").write_text(text)
        (tmp_path / "blobs.py").write_text((TASKS / "blobs.py").read_text())
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("words", "text", "code", "message"),
    [
        ("run", SOUND + "[search]\nnum_trails = 3\n", 10, "did you mean num_trials?"),
        ("tune", SOUND + '[search]\nnum_trials = "3"\n', 10, "should be a valid integer, not '3'"),
        ("run", SOUND.replace("Blobs", "Blub"), 11, "has no class 'Blub'"),
        ("run", SOUND.replace("Blobs", "WrongShape"), 12, "make model, loss and data agree"),
        ("data check", SOUND.replace('"1"', '"nowhere"'), 13, "cannot read"),
        ("model show", SOUND, 16, "no model is registered yet; make one with: minga run"),
        ("train --params absent.json", SOUND, 10, "absent.json cannot be read"),
        ("run --from champion --auto", SOUND, 10, "leave --auto and --fresh out"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_mistake_is_a_line_and_a_code(project, words, text, code, message):
    """Each mistake ends with its own code and at most two lines on stderr, never a traceback."""
    done = minga_here(*words.split(), cwd=project(text))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("minga: ")
    assert len(done.stderr.splitlines()) <= 2
    assert done.stdout == ""


def test_no_project_is_a_line_and_a_code(tmp_path):
    """Outside of a project the message says how to make one."""
    done = minga("run", cwd=tmp_path)
    assert done.returncode == 10
    assert "make one with: minga init DIR" in done.stderr


def test_wrong_command_line_is_code_2(tmp_path):
    """An unknown option is the command line's own error."""
    assert minga("run", "--nope", cwd=tmp_path).returncode == 2


def test_init_writes_a_project_once(tmp_path):
    """The first call writes and says what is next, the second refuses."""
    first = minga("init", tmp_path / "plant")
    assert first.returncode == 0, first.stderr
    assert "minga run" in first.stdout
    assert (tmp_path / "plant" / "task.py").is_file()
    second = minga("init", tmp_path / "plant")
    assert second.returncode == 10
    assert "not empty" in second.stderr


def test_listing_is_json_and_nothing_else(project):
    """With --json stdout is one JSON value, even where there is nothing to list."""
    done = minga("model", "list", "--json", cwd=project())
    assert json.loads(done.stdout) == []
    assert not (project() / ".minga").exists()


def test_data_check_tells_what_was_found(project):
    """The report has counts, digest and columns; sound data ends with 0."""
    done = minga("data", "check", "--json", cwd=project())
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["num_examples"] == {"train": 300, "validation": 100, "test": 200}
    assert len(report["digest"]) == 64
    assert [column["name"] for column in report["data_schema"]["columns"]] == [
        "x0",
        "x1",
        "x2",
        "x3",
    ]


@pytest.mark.parametrize(
    "words", ["init", "run", "tune", "train", "data check", "model list", "model promote"]
)
def test_help_has_an_example(words):
    """Every command's help shows how it is called."""
    assert f"Example: minga {words}" in minga(*words.split(), "--help").stdout


def test_help_is_fast():
    """`minga --help` takes some 0.2 s of a processor: it loads no part of Minga.

    The best of five, and not by the clock on the wall, which runs for other processes too. These
    slow it also where they leave it a core: they share its caches.
    """

    def measure():
        before = os.times()
        assert minga("--help").returncode == 0
        after = os.times()
        return (
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )

    assert min(measure() for _ in range(5)) < 0.4
