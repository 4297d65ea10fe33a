"""Tasks that look for what is unusual, with an autoencoder and with an isolation forest."""

# ruff: noqa: RUF012 - Tasks as researchers write them

import numpy as np
import pytest
import torch

from minga.training import Split
from minga.training.anomalies import AnomalyTask, threshold_of, unlabelled
from minga.training.candidate import assess
from minga.training.config import GateConfig, TrainConfig
from minga.training.data import profile_of
from minga.training.export import run_onnx
from minga.training.models import exported, largest_gap
from minga.training.selection.contenders import contenders_of

CONFIG = TrainConfig(epochs=15)


class Machine(AnomalyTask):
    """Three readings that follow from one hidden load, and a mode."""

    name = "machine"
    columns = ("current", "heat", "noise", "mode")
    categories = {"mode": ("idle", "busy")}
    defaults = {**AnomalyTask.defaults, "code": 2, "lr": 0.01}
    false_alarms = 0.02

    def data(self, source):
        return unlabelled(readings(3000), seed=1)


def readings(num_rows):
    """Readings of a machine in order."""
    generator = np.random.default_rng(0)
    load = generator.normal(size=num_rows)
    mode = (load > 0).astype(float)
    near = generator.normal(size=(3, num_rows)) * 0.1
    columns = [10 * (load + near[0]), 300 + 5 * (load + near[1]), -load + near[2], mode]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def machine():
    """The Task with its data."""
    task = Machine()
    return task, task.data("")


@pytest.fixture(scope="module", params=["own", "isolation-forest"])
def fitted(request, machine):
    """A model that was fitted."""
    task, splits = machine
    contender = contenders_of(task, CONFIG)[request.param]
    return contender.fit(splits.train, splits.validation, seed=1)


def test_anomalies_are_found_without_labels(machine, fitted):
    """Readings in unusual company score higher than those in order."""
    task, splits = machine
    metrics = task.metrics(fitted.predict(splits.test.inputs), splits.test.targets)
    assert metrics["roc_auc"] > 0.8
    assert metrics["average_precision"] > 0.3
    assert metrics["found"] > 0.08


def test_threshold_is_that_of_the_validation_split(machine, fitted):
    """So many ordinary rows lie above 0 as the Task allows, on validation and about so on test."""
    task, splits = machine
    outputs = fitted.predict(splits.validation.inputs)
    assert task.metrics(outputs, splits.validation.targets)["false_alarms"] == pytest.approx(
        0.02, abs=0.003
    )
    judged = task.metrics(fitted.predict(splits.test.inputs), splits.test.targets)
    assert judged["false_alarms"] < 0.05


def test_gates_profile_and_export_hold(machine, fitted):
    """The exported model, threshold and texts inside, gives the same and passes the gates."""
    task, splits = machine
    found = assess(
        task,
        fitted,
        splits.test,
        schema=task.schema(splits.train),
        profile=profile_of(task, splits.train),
        champion=None,
        config=GateConfig(floors={"roc_auc": 0.8}, max_missing_loss=1.0, max_noise_loss=1.0),
        seed=1,
    )
    assert found.report.blessed, [str(gate) for gate in found.report.refused]
    assert found.profile.outputs[0].deviation > 0
    outputs = run_onnx(exported(task, fitted), splits.test.inputs)
    assert largest_gap(fitted, outputs, splits.test.inputs) < 1e-5


def test_both_kinds_compete(machine):
    """An autoencoder competes with a forest and with nothing that needs targets."""
    assert set(contenders_of(machine[0], CONFIG)) == {"own", "isolation-forest"}


def test_known_anomalies_are_never_learned_from():
    """The loss is that of the ordinary rows; without any it is 0 and not undefined."""
    task = Machine()
    outputs = torch.tensor([1.0, 2.0, 100.0])
    assert float(task.loss(outputs, torch.tensor([0.0, 0.0, 1.0]))) == 1.5
    assert float(task.loss(outputs, torch.ones(3))) == 0.0


def test_threshold_is_a_quantile_of_ordinary_scores():
    """Known anomalies among the validation rows do not move it."""
    scores, targets = np.arange(101.0), np.zeros(101)
    assert threshold_of(scores, targets, 0.1) == pytest.approx(90)
    targets[91:] = 1
    assert threshold_of(scores, targets, 0.1) == pytest.approx(81)
    assert threshold_of(scores, np.ones(101), 0.1) == pytest.approx(90)


def test_made_up_anomalies_are_ordinary_column_by_column():
    """Each of their values was seen, none of their rows was, and none is learned from."""
    splits = unlabelled(readings(1000), seed=3)
    assert not splits.train.targets.any()
    for split in (splits.validation, splits.test):
        assert split.targets.sum() == 20
        ordinary, made_up = split.inputs[split.targets == 0], split.inputs[split.targets == 1]
        assert all(np.isin(made_up[:, i], ordinary[:, i]).all() for i in range(4))
        rows = {row.tobytes() for row in ordinary}
        assert not [row for row in made_up[:, :3] if row.tobytes() in rows]
    again = unlabelled(readings(1000), seed=3)
    assert np.array_equal(again.test.inputs, splits.test.inputs)


def test_without_known_anomalies_only_alarms_are_counted():
    """What needs anomalies to be measured is undefined where none is known."""
    metrics = Machine().metrics(np.array([-1.0, 1.0]), np.zeros(2))
    assert metrics["false_alarms"] == 0.5
    assert np.isnan([metrics["average_precision"], metrics["roc_auc"], metrics["found"]]).all()


def test_forest_needs_no_more_than_a_few_rows(machine):
    """Fewer rows than a tree's sample are enough to grow one."""
    task, splits = machine
    few = Split(inputs=splits.train.inputs[:50], targets=splits.train.targets[:50])
    model = contenders_of(task, CONFIG)["isolation-forest"].fit(few, splits.validation, seed=1)
    assert np.isfinite(model.predict(splits.test.inputs)).all()
