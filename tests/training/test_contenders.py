"""Kinds of models: networks, trees, and a user's own, all of one Task."""

# ruff: noqa: RUF012 - Tasks as researchers write them

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from minga.training import Maximize, Minimize, Split, Splits, Task, TaskReference
from minga.training.bundle import (
    MODEL,
    WEIGHTS,
    Bundle,
    Digests,
    has_weights,
    read_parameters,
    read_verdict,
)
from minga.training.candidate import assess
from minga.training.config import GateConfig, TrainConfig
from minga.training.data import profile_of
from minga.training.errors import RegistryError, TaskError, VerdictError
from minga.training.export import run_onnx
from minga.training.federated import TaskTrainer
from minga.training.lineage import trace
from minga.training.models import ExportedModel, exported, largest_gap
from minga.training.network import build_network, parameters_of
from minga.training.reference import with_reference
from minga.training.selection.boosting import Boosting
from minga.training.selection.contenders import contender_of, contenders_of, params_of
from minga.training.selection.graphs import exact_thresholds

CONFIG = TrainConfig(epochs=3)
TASKS = Path(__file__).parent / "tasks"
LETTERS = ("a", "b", "c")


class Tabular(Task):
    """Rows of numbers with holes and of texts; subclasses say what is learned."""

    name = "tabular"
    columns = ("x", "letter", "y", "grade")
    categories = {"letter": LETTERS, "grade": (1, 2, 3)}
    defaults = {"lr": 0.01}
    objective = Maximize("accuracy")

    def data(self, source):
        generator = np.random.default_rng(0)
        inputs = generator.normal(size=(900, 4)).astype(np.float32) * [1, 1, 1000, 1]
        inputs[:, 1] = generator.integers(3, size=900)
        inputs[:, 3] = generator.integers(1, 4, size=900)
        targets = self.target(inputs, generator)
        inputs[generator.random(inputs.shape) < 0.1] = np.nan
        parts = [
            Split(inputs=inputs[i : i + 300].astype(np.float32), targets=targets[i : i + 300])
            for i in (0, 300, 600)
        ]
        return Splits(train=parts[0], validation=parts[1], test=parts[2])

    def target(self, inputs, generator):
        return (inputs[:, 0] + inputs[:, 1] > 1).astype(np.float32)

    def model(self, params):
        return nn.Sequential(nn.Linear(self.width, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}


class Shares(Tabular):
    """Gives probabilities."""

    def model(self, params):
        return nn.Sequential(nn.Linear(self.width, 1), nn.Sigmoid())

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy(outputs[:, 0], targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs[:, 0] > 0.5) == (targets > 0.5)))}


class Classes(Tabular):
    """Three classes, as logits."""

    final = nn.Identity

    def target(self, inputs, generator):
        return np.clip(np.round(inputs[:, 0]) + 1, 0, 2).astype(np.int64)

    def model(self, params):
        return nn.Sequential(nn.Linear(self.width, 3), self.final())

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean(outputs.argmax(axis=1) == targets))}


class LogShares(Classes):
    """Three classes, as logarithms of probabilities."""

    def final(self):
        return nn.LogSoftmax(dim=1)

    def loss(self, outputs, targets):
        return nn.functional.nll_loss(outputs, targets)


class Number(Tabular):
    """A number."""

    objective = Minimize("error")

    def target(self, inputs, generator):
        return inputs[:, 0] * 3 + inputs[:, 3] + generator.normal(size=len(inputs)) * 0.1

    def loss(self, outputs, targets):
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs, targets):
        return {"error": float(np.sqrt(np.mean((outputs - targets) ** 2)))}


@pytest.mark.parametrize("kind", [Tabular, Shares, Classes, LogShares, Number])
def test_trees_answer_as_the_own_model_would(kind):
    """Boosted trees give what the Task's loss and metrics take, and their export gives the same.

    The exported model takes whole rows as they stand in the table: texts, and holes.
    """
    task = kind()
    splits = task.data("")
    model = Boosting(task).fit(splits.train, splits.validation, seed=1)
    outputs = model.predict(splits.test.inputs)
    own = build_network(task, task.defaults, splits.train, seed=1)
    assert outputs.shape == own(torch.zeros(300, 4)).shape
    metrics = task.metrics(outputs, splits.test.targets)
    assert metrics.get("accuracy", 0) > 0.8 or metrics.get("error", 9) < 1.5
    assert np.isfinite(float(task.loss(*map(torch.from_numpy, (outputs, splits.test.targets)))))
    content = exported(task, model)
    given = onnx.load_from_string(content).graph.input[0].type.tensor_type
    assert given.elem_type == TensorProto.STRING
    assert largest_gap(model, run_onnx(content, splits.test.inputs), splits.test.inputs) < 1e-5


def test_trees_take_the_same_branches_in_float32():
    """No float32 changes its side of a threshold when the threshold is rounded."""
    generator = np.random.default_rng(0)
    values = np.sort(generator.normal(size=2000).astype(np.float32))
    between = np.concatenate([(values[1:].astype(np.float64) + values[:-1]) / 2, values])
    near = np.nextafter(values, np.float32(np.inf)).astype(np.float64)
    thresholds = np.concatenate([between, (near + values) / 2])
    rounded = exact_thresholds(thresholds)
    assert np.array_equal(rounded, rounded.astype(np.float32))
    for value in values[::50]:
        assert np.array_equal(value <= thresholds, value <= rounded)


def test_what_trees_cannot_give_is_said():
    """A Task that gives a picture, or whose loss takes no scores, is refused in words."""

    class Picture(Tabular):
        def model(self, params):
            return nn.Sequential(nn.Linear(self.width, 6), nn.Unflatten(1, (2, 3)))

    class Odd(Tabular):
        def loss(self, outputs, targets):
            raise ValueError("never")

    for kind, words in ((Picture, "trees give one number"), (Odd, "loss takes nothing that trees")):
        task = kind()
        splits = task.data("")
        with pytest.raises(TaskError, match=words):
            Boosting(task).fit(splits.train, splits.validation, seed=1)


@pytest.mark.parametrize("name", ["linear", "mlp", "own"])
def test_networks_are_contenders_by_a_hyper_parameter(blobs, splits, name):
    """A plain network takes and gives what the own does, learns, and exports."""
    contender = contenders_of(blobs, CONFIG)[name]
    model = contender.fit(splits.train, splits.validation, seed=1)
    outputs = model.predict(splits.test.inputs)
    assert outputs.shape == (200,)
    assert blobs.metrics(outputs, splits.test.targets)["accuracy"] > 0.75
    assert largest_gap(model, run_onnx(model.to_onnx(), splits.test.inputs), splits.test.inputs) < (
        1e-4
    )


def test_plain_networks_are_trained_on_devices(blobs, splits):
    """What was chosen reaches a device with its hyper-parameters, and its weights are averaged."""
    config = {**params_of(blobs, "linear", blobs.defaults), "epochs": 1, "seed": 3}
    trainer = TaskTrainer(blobs, splits)
    start = trainer.initial(config)
    assert start["model.1.weight"].shape == (1, 4)
    update = trainer.fit(start, config)
    assert update.delta.keys() == start.keys()
    assert np.abs(update.delta["model.1.weight"]).max() > 0
    trees = params_of(blobs, "boosting", blobs.defaults)
    with pytest.raises(TaskError, match="no weights to federate"):
        trainer.initial(trees)


def test_early_epochs_may_be_the_best(blobs, splits):
    """The weights of the best epoch on the validation split are kept, not those of the last."""
    params = {**blobs.defaults, "lr": 0.5}
    contender = contender_of(blobs, params, TrainConfig(epochs=12))
    model = contender.fit(splits.train, splits.validation, seed=1)
    kept = blobs.metrics(model.predict(splits.validation.inputs), splits.validation.targets)
    from minga.training.loop import Learner, fit

    network = build_network(blobs, params, splits.train, seed=1)
    history = fit(
        Learner(blobs, network, params),
        splits.train,
        epochs=12,
        seed=1,
        validation=splits.validation,
    )
    assert kept["accuracy"] == max(record["accuracy"] for record in history)


class Nearest:
    """A user's own contender: the class whose mean is nearer, in ONNX without any library."""

    name = "nearest-mean"

    def fit(self, train, validation, *, seed):
        scale = train.inputs.std(axis=0)
        means = [train.inputs[train.targets == one].mean(axis=0) / scale for one in (0, 1)]
        weights = 2 * (means[1] - means[0]) / scale
        bias = (means[0] ** 2).sum() - (means[1] ** 2).sum()
        return NearestModel(weights[:, None].astype(np.float32), np.float32(bias))


class NearestModel:
    """Its model."""

    def __init__(self, weights, bias):
        self.weights, self.bias = weights, bias

    def predict(self, inputs):
        return (inputs @ self.weights)[:, 0] + self.bias

    def to_onnx(self):
        nodes = [
            helper.make_node("MatMul", ["input", "weights"], ["product"]),
            helper.make_node("Squeeze", ["product", "axis"], ["row"]),
            helper.make_node("Add", ["row", "bias"], ["output"]),
        ]
        constants = [
            helper.make_tensor("weights", 1, self.weights.shape, self.weights.ravel()),
            helper.make_tensor("bias", 1, [], [self.bias]),
            helper.make_tensor("axis", 7, [1], [1]),
        ]
        graph = helper.make_graph(
            nodes,
            "nearest",
            [helper.make_tensor_value_info("input", 1, ["batch", 4])],
            [helper.make_tensor_value_info("output", 1, ["batch"])],
            constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 10
        return model.SerializeToString()


@pytest.fixture
def with_nearest(blobs):
    """The well-behaved Task with a contender of its own."""
    kind = type("WithNearest", (type(blobs),), {"contenders": lambda self: [Nearest()]})
    return kind()


def test_anything_that_exports_is_a_contender(with_nearest, splits):
    """A user's own model is fitted, judged by the gates, and refused nothing that others have."""
    contender = contender_of(with_nearest, {"architecture": "nearest-mean"}, CONFIG)
    model = contender.fit(splits.train, splits.validation, seed=1)
    found = assess(
        with_nearest,
        model,
        splits.test,
        schema=with_nearest.schema(splits.train),
        profile=profile_of(with_nearest, splits.train),
        champion=None,
        config=GateConfig(floors={"accuracy": 0.75}),
        seed=1,
    )
    assert found.report.blessed, [str(gate) for gate in found.report.refused]
    assert found.report.metrics.keys() == {"loss", "accuracy"}
    assert found.profile.outputs


def test_names_of_contenders_are_checked(blobs):
    """A name that is taken, or is none, and one that nobody has, are refused."""
    for name, words in (("boosting", "called already"), ("a/b", "lower-case letters")):
        one = type("Named", (Nearest,), {"name": name})()
        kind = type("Clash", (type(blobs),), {"contenders": lambda self, one=one: [one]})
        with pytest.raises(TaskError, match=words):
            contenders_of(kind(), CONFIG)
    with pytest.raises(TaskError, match="has no contender 'forests'; there are linear, mlp, own"):
        contender_of(blobs, {"architecture": "forests"}, CONFIG)


def test_export_without_our_names_is_refused(blobs):
    """What cannot be asked as any other model of the Task never reaches the gates."""
    model = onnx.load_from_string(NearestModel(np.zeros((4, 1), np.float32), 0.0).to_onnx())
    model.graph.output[0].name = "label"
    with pytest.raises(TaskError, match="must take 'input' and give 'output'"):
        exported(blobs, ExportedModel(model.SerializeToString()))
    with pytest.raises(TaskError, match="gave no ONNX model"):
        exported(blobs, ExportedModel(b"pickle"))


@pytest.fixture(scope="module")
def tree_bundle_once(keyring, tmp_path_factory):
    """The bundle of a version that is no network."""
    reference = TaskReference(root=TASKS, name="blobs.py:Blobs")
    blobs = reference.load()
    splits = blobs.data("1")
    model = Boosting(blobs).fit(splits.train, splits.validation, seed=1)
    schema = blobs.schema(splits.train)
    found = assess(
        blobs,
        model,
        splits.test,
        schema=schema,
        profile=profile_of(blobs, splits.train),
        champion=None,
        config=GateConfig(max_calibration_error=1.0),
        seed=1,
    )
    lineage = trace(
        blobs,
        reference,
        params={"architecture": "boosting"},
        seed=1,
        source="1",
        data_digest="d" * 64,
        num_examples=300,
    )
    graphs = [onnx.load_from_string(each).graph for each in (exported(blobs, model), found.onnx)]
    assert graphs[0] == graphs[1], "only its reference was added"
    folder = tmp_path_factory.mktemp("trees") / "bundle"
    Bundle(
        onnx=found.onnx,
        parameters=None,
        schema=schema,
        profile=found.profile,
        gates=found.report,
        lineage=lineage,
    ).write(folder, keyring)
    return folder


@pytest.fixture
def tree_bundle(tree_bundle_once, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(tree_bundle_once, tmp_path / "bundle"))


def test_bundle_without_weights_is_whole(tree_bundle, keyring):
    """It has everything but weights, nothing that is pickled, and says what it cannot do."""
    assert not has_weights(tree_bundle)
    names = {file.name for file in tree_bundle.iterdir()}
    assert not [name for name in names if name.endswith((".pkl", ".pt", ".joblib"))]
    assert b"sklearn" not in (tree_bundle / MODEL).read_bytes()
    assert Digests.of(tree_bundle).weights == ""
    assert read_verdict(tree_bundle, "blobs", keyring).metrics
    assert "no weights to federate" in (tree_bundle / "README.md").read_text()
    with pytest.raises(RegistryError, match=r"no network but 'boosting'.*cannot be federated"):
        read_parameters(tree_bundle)
    assert json.loads((tree_bundle / "lineage.json").read_text())["params"] == {
        "architecture": "boosting"
    }


def test_weights_can_be_neither_added_nor_removed(tree_bundle, bundle_folder, keyring, tmp_path):
    """The verdict covers whether there are weights, so nobody slips some in or takes them out."""
    before = Digests.of(tree_bundle).bundle
    shutil.copy(bundle_folder / WEIGHTS, tree_bundle / WEIGHTS)
    assert Digests.of(tree_bundle).bundle != before
    with pytest.raises(VerdictError, match="other files"):
        read_verdict(tree_bundle, "blobs", keyring)
    stripped = tmp_path / "stripped"
    shutil.copytree(bundle_folder, stripped)
    (stripped / WEIGHTS).unlink()
    with pytest.raises(VerdictError, match="other files"):
        read_verdict(stripped, "blobs", keyring)


def test_exported_models_are_judged_anew_as_they_are(blobs, splits, tree_bundle):
    """Of a registered model that is no network the very same bytes are judged again."""
    content = (tree_bundle / MODEL).read_bytes()
    model = ExportedModel(content)
    assert exported(blobs, model) == content
    assert parameters_of(build_network(blobs, blobs.defaults, splits.train, seed=1))
    assert model.predict(splits.test.inputs).shape == (200,)
    schema, profile = blobs.schema(splits.train), profile_of(blobs, splits.train)
    outputs = model.predict(splits.test.inputs)
    again = with_reference(
        content, blobs, schema=schema, profile=profile, test=splits.test, outputs=outputs
    )
    assert again == content, "one reference takes the place of the other"
