"""The reference that a trained model carries in its file, for its monitor."""

import numpy as np
import onnx
import pytest

from minga.inference.monitor.estimates import estimated
from minga.inference.monitor.reference import AnswerKind, Reference, Role
from minga.inference.monitor.sketch import Sketch
from minga.training import Maximize, Split, Task
from minga.training.bundle import MODEL, PROFILE
from minga.training.export import run_onnx
from minga.training.profile import Profile, profile_columns
from minga.training.reference import describe
from minga.training.schema import infer_schema


class Answering(Task):
    """A Task of which only the meaning of outputs matters."""

    name = "answering"
    objective = Maximize("accuracy")

    def __init__(self, to_probabilities=None):
        self._to_probabilities = to_probabilities

    def data(self, source):
        raise NotImplementedError

    def model(self, params):
        raise NotImplementedError

    def loss(self, outputs, targets):
        raise NotImplementedError

    def metrics(self, outputs, targets):
        raise NotImplementedError

    def probabilities(self, outputs):
        return self._to_probabilities(outputs) if self._to_probabilities else None


def reference_of(task, inputs, targets, outputs) -> Reference:
    """Describe a split as if it were both training and test data."""
    import json

    split = Split(inputs=inputs, targets=targets)
    profile = Profile(
        num_examples=len(split),
        inputs=profile_columns(split.inputs),
        targets=profile_columns(split.targets),
    )
    given = describe(task, schema=infer_schema(split), profile=profile, test=split, outputs=outputs)
    return Reference.parse(json.dumps(given))


def softmax(outputs):
    """Give each class's probability."""
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(outputs):
    """Give the probability of a yes."""
    return 1 / (1 + np.exp(-outputs))


def test_registered_model_carries_its_reference(bundle_folder):
    """The bundle's model has the profile's columns in its metadata, and computes as before."""
    content = (bundle_folder / MODEL).read_bytes()
    metadata = {p.key: p.value for p in onnx.load_from_string(content).metadata_props}
    reference = Reference.of_metadata(metadata)
    profile = Profile.read(bundle_folder / PROFILE)
    for column, profiled in zip(reference.of_role(Role.INPUT), profile.inputs, strict=True):
        assert (column.name, column.edges) == (profiled.name, profiled.edges)
    (output,) = reference.of_role(Role.OUTPUT)
    assert output.shares == profile.outputs[0].shares
    assert run_onnx(content, np.zeros((2, 4), np.float32)).shape == (2,)


@pytest.fixture
def generator():
    return np.random.default_rng(5)


def test_classes_are_judged_by_the_lead_of_the_largest(generator):
    """Of several classes the estimate is of accuracy, and follows the scores of a window."""
    outputs = generator.normal(size=(4000, 3)) * 2
    chances = softmax(outputs)
    targets = (generator.random((4000, 1)) > np.cumsum(chances, 1)).sum(1)
    inputs = generator.normal(size=(4000, 2))
    reference = reference_of(Answering(softmax), inputs, targets, outputs)
    assert reference.answers.kind is AnswerKind.CLASS
    assert list(reference.answers.rates) == sorted(reference.answers.rates)
    assert reference.only(Role.ANSWER).categories == (0.0, 1.0, 2.0)
    sketch = Sketch(reference)
    sketch.add(inputs.astype(np.float32), outputs * 0.6)
    (unsure,) = estimated(reference, sketch.of_column(Role.SCORE))
    accuracy = np.mean(outputs.argmax(1) == targets)
    assert unsure.reference == pytest.approx(accuracy, abs=0.01)
    expected = softmax(outputs * 0.6).max(1).mean()
    assert unsure.value == pytest.approx(expected, abs=0.03)
    assert unsure.reference - unsure.value > 0.08


def test_numbers_are_judged_by_their_error(generator):
    """A model that answers a number has its error on the test split, and bins to estimate it by."""
    inputs = generator.normal(size=(500, 2))
    targets = inputs[:, 0].astype(np.float32)
    outputs = targets + generator.normal(size=500) * 0.5
    reference = reference_of(Answering(), inputs, targets, outputs)
    assert reference.answers.kind is AnswerKind.NUMBER
    assert reference.answers.error == pytest.approx(0.4, abs=0.05)
    score = reference.only(Role.SCORE)
    assert score is not None
    assert len(score.shares) == len(score.edges) + 1
    assert sum(score.shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("to_probabilities", "outputs", "why"),
    [
        (None, np.linspace(-1, 1, 200), "classes of which no probabilities are known"),
        (lambda o: sigmoid(-o), np.linspace(-1, 1, 200), "a larger output is less likely"),
        (lambda o: softmax(o)[:, ::-1], np.eye(2)[np.arange(200) % 2], "other classes are chosen"),
    ],
)
def test_what_cannot_be_judged_is_not_guessed(to_probabilities, outputs, why):
    """Where it is not known what outputs mean, there is drift to watch, but no performance."""
    targets = np.arange(200) % 2
    inputs = np.random.default_rng(1).normal(size=(200, 2))
    reference = reference_of(Answering(to_probabilities), inputs, targets, outputs)
    assert reference.answers is None, why
    assert len(reference.of_role(Role.OUTPUT)) == (1 if outputs.ndim == 1 else 2)


def test_a_rare_yes_has_bins_and_a_threshold_of_its_own(generator):
    """Of 3 % the score's bins resolve both answers; a yes begins where the probability is 1/2."""
    outputs = generator.normal(-4, 1.5, size=6000)
    targets = (generator.random(6000) < sigmoid(outputs)).astype(np.float32)
    inputs = generator.normal(size=(6000, 1))
    reference = reference_of(Answering(sigmoid), inputs, targets, outputs)
    score = reference.only(Role.SCORE)
    assert score.edges[reference.answers.cut - 1] == pytest.approx(0, abs=0.1)
    assert len(score.shares) > 10
    low = reference_of(Answering(sigmoid), inputs, targets, outputs - 100)
    assert low.answers.cut == len(low.only(Role.SCORE).shares)


def test_empty_and_constant_columns_have_bins(generator):
    """A column without values, or with one, does not stand in the way of the others."""
    inputs = generator.normal(size=(100, 3))
    inputs[:, 1], inputs[:, 2] = np.nan, 3
    targets = generator.integers(0, 2, 100)
    reference = reference_of(Answering(), inputs, targets, generator.normal(size=100))
    assert [len(column.shares) for column in reference.of_role(Role.INPUT)] == [10, 1, 1]
    sketch = Sketch(reference)
    sketch.add(inputs, None)
    assert sketch.missing.tolist()[:3] == [0, 100, 0]
