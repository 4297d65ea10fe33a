"""Infra validation in real processes of both runtimes."""

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from minga.cluster import runtimes
from minga.training import TaskReference
from minga.training.export import run_onnx, to_onnx
from minga.training.network import build_network

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parents[1] / "training" / "tasks"


@pytest.fixture
def stage(tmp_path):
    """Puts a model where a runtime loads it from."""

    def put(onnx):
        file = tmp_path / "model.onnx"
        file.write_bytes(onnx)
        return file

    return put


@pytest.fixture(scope="module")
def exported():
    """An ONNX model, inputs, and what it makes of them."""
    task = TaskReference(root=TASKS, name="blobs.py:Blobs").load()
    splits = task.data("1")
    onnx = to_onnx(build_network(task, task.defaults, splits.train, seed=1), splits.test.inputs)
    inputs = splits.test.inputs[:16]
    return onnx, inputs, run_onnx(onnx, inputs)


def children():
    """This process's children that are on trial."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if any(".trial" in word for word in child.cmdline())]


def test_both_runtimes_answer(exported, stage):
    """A fresh server and a fresh device load the file, answer as the export does, and end."""
    trials = runtimes.runtimes_for("blobs", stage, timeout_s=120)(*exported)
    assert [trial.runtime for trial in trials] == ["serving", "device"]
    assert all(trial.error is not None and trial.error < 1e-6 for trial in trials), trials
    assert not children()


def test_other_answers_and_broken_files_are_seen(exported, stage):
    """Answers that differ are measured; a file that does not load is refused in words.

    So is a store that gives other bytes back than it got.
    """
    onnx, inputs, outputs = exported
    try_out = runtimes.runtimes_for("blobs", stage, timeout_s=120)
    assert [trial.error for trial in try_out(onnx, inputs, outputs + 1)] == pytest.approx([1, 1])
    for trial in try_out(onnx[:-50], inputs, outputs):
        assert trial.error is None
        assert "no ONNX model" in trial.detail
    lossy = runtimes.runtimes_for("blobs", lambda model: stage(model + b"\0"), timeout_s=120)
    for trial in lossy(onnx, inputs, outputs):
        assert trial.error is None
        assert "the file was altered" in trial.detail


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import time; time.sleep(600)", "does not answer"),
        ("import minga.missing", "it ended: Mod"),
    ],
)
def test_runtime_that_does_not_come_up_is_ended(exported, stage, monkeypatch, code, complaint):
    """A runtime that hangs or dies costs its time limit and no more; nothing stays behind."""
    folder = stage(b"").parent
    (folder / "hanging_trial.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{':'.join(sys.path)}")
    monkeypatch.setattr(runtimes, "RUNTIMES", {"device": "hanging_trial"})
    monkeypatch.setattr(runtimes, "END_TIMEOUT_S", 0.5)
    (trial,) = runtimes.runtimes_for("blobs", stage, timeout_s=2)(*exported)
    assert trial.error is None
    assert complaint in trial.detail
    assert not [child for child in psutil.Process().children() if "hanging" in str(child.cmdline())]


def test_device_runtime_is_light():
    """What tries a model out as a device loads nothing that a device does not have."""
    import subprocess

    code = "import sys, minga.federation.device.trial; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "ray", "mlflow", "pandas", "sklearn"} & set(loaded)
    assert np.__name__ in loaded
