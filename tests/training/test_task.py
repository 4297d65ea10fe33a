"""Loading a Task from a file, and the data it gives."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.training import Split, load_task
from minga.training.data import read_splits
from minga.training.errors import DataError, TaskError


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blobs", "not of the form"),
        ("absent.py:Blobs", "there is no file"),
        ("blobs.py:Blub", "has no class 'Blub'; it has .*Blobs"),
        ("blobs.py:NoMetrics", "is not a Task"),
        ("blobs.py:cloud", "is not a Task"),
        ("blobs.py:Unfinished", "lacks loss, metrics, model, objective"),
        ("blobs.py:BadName", "name is 'Bad Name'"),
        ("blobs.py:NoDefault", "depth is searched but has no value"),
        ("blobs.py:BadObjective", "objective is 'accuracy'"),
    ],
)
def test_unusable_task_is_explained(reference, name, words):
    """Whatever is wrong with a Task is one message that names it."""
    with pytest.raises(TaskError, match=words) as caught:
        load_task(name, reference.root)
    assert "\n" not in str(caught.value)


def test_task_with_a_bug_is_explained(tmp_path):
    """A file that does not import says why, and leaves no half-loaded module behind."""
    (tmp_path / "task.py").write_text("import a_module_that_is_not_there\n")
    before = set(sys.modules)
    with pytest.raises(TaskError, match="does not import: ModuleNotFoundError"):
        load_task("task.py:Blobs", tmp_path)
    assert not {name for name in set(sys.modules) - before if name.startswith("minga_task")}


def test_task_may_import_files_beside_it(tmp_path, reference):
    """A Task's folder is on the path, behind everything that is installed."""
    (tmp_path / "beside_the_task.py").write_text("WIDTH = 7\n")
    source = (reference.root / "blobs.py").read_text()
    (tmp_path / "task.py").write_text(f"from beside_the_task import WIDTH\n{source}")
    assert load_task("task.py:Blobs", tmp_path).name == "blobs"


def test_task_loads_in_a_process_that_knows_only_its_place(reference):
    """A reference is enough to load the Task elsewhere, as Ray's workers do."""
    code = (
        "from pathlib import Path; from minga.training import TaskReference;"
        f"print(TaskReference(root=Path({str(reference.root)!r}), name='blobs.py:Blobs')"
        ".load().name)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "blobs"


def test_importing_training_loads_nothing_heavy():
    """`minga.training` itself needs neither torch nor Ray nor MLflow."""
    code = "import sys, minga.training; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_relative_source_is_taken_from_the_project(reference):
    """Relative paths are the project's; URIs and absolute paths are left alone."""
    assert reference.resolve("data/a.csv") == str(reference.root / "data/a.csv")
    assert reference.resolve("/data/a.csv") == "/data/a.csv"
    assert reference.resolve("s3://bucket/a.csv") == "s3://bucket/a.csv"


@given(st.integers(0, 5), st.integers(0, 5))
def test_split_needs_a_target_for_each_input(num_inputs, num_targets):
    """Inputs and targets of different length are refused, of equal length taken."""
    arrays = {"inputs": np.zeros((num_inputs, 2)), "targets": np.zeros(num_targets)}
    if num_inputs == num_targets:
        assert len(Split(**arrays)) == num_inputs
    else:
        with pytest.raises(DataError, match="inputs but"):
            Split(**arrays)


def test_split_computes_in_float32_and_keeps_integers():
    """Floats of another width become float32; class numbers stay integers."""
    split = Split(inputs=np.zeros((3, 2)), targets=np.array([0, 1, 2]))
    assert split.inputs.dtype == np.float32
    assert split.targets.dtype.kind == "i"


def test_split_refuses_text():
    """Arrays that are not numbers are refused with what they are."""
    with pytest.raises(DataError, match="inputs are <U1"):
        Split(inputs=np.array(["a"]), targets=np.array([1]))


def test_unreadable_source_is_explained(blobs):
    """An error in the Task's `data` names the source and the cause."""
    with pytest.raises(DataError, match=r"Blobs.data cannot read nowhere: ValueError"):
        read_splits(blobs, "nowhere")
