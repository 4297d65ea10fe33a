"""Errors of numbers, estimated without labels, against what they truly are."""

import json

import numpy as np
import pytest

from minga.inference.errors import ModelError
from minga.inference.monitor.judgement import AlarmKind, judge
from minga.inference.monitor.reference import Reference, Role
from minga.inference.monitor.sketch import Sketch
from minga.training import Minimize, Split, Task
from minga.training.data import profile_of
from minga.training.reference import describe
from minga.training.schema import infer_schema


class Load(Task):
    """A number that is the harder to tell the larger the second column is."""

    name = "load"
    columns = ("level", "wind", "kind")
    objective = Minimize("mae")

    def data(self, source):
        raise NotImplementedError

    def model(self, params):
        raise NotImplementedError

    def loss(self, outputs, targets):
        raise NotImplementedError

    def metrics(self, outputs, targets):
        return {"mae": float(np.abs(outputs - targets).mean())}


def rows(num_rows, seed, *, wind=0.0, noise=1.0):
    """Inputs, some missing, and the truth; `wind` moves a column, `noise` what cannot be seen."""
    generator = np.random.default_rng(seed)
    table = generator.normal(size=(num_rows, 3))
    table[:, 1] += wind
    table[:, 2] = generator.integers(3, size=num_rows)
    spread = noise * (0.2 + np.log1p(np.exp(2 * table[:, 1])))
    truth = table[:, 0] + generator.normal(size=num_rows) * spread
    table[generator.random(num_rows) < 0.02, 0] = np.nan
    return table.astype(np.float32), truth.astype(np.float32)


def answers(inputs):
    """What the model says."""
    return np.nan_to_num(inputs[:, 0])


@pytest.fixture(scope="module")
def described():
    """What training writes, as plain values."""
    task = Load()
    learned, judged = (Split(inputs=x, targets=y) for x, y in (rows(4000, 1), rows(4000, 2)))
    schema = infer_schema(learned, task.columns)
    profile = profile_of(task, learned)
    outputs = answers(judged.inputs)
    return describe(task, schema=schema, profile=profile, test=judged, outputs=outputs)


@pytest.fixture(scope="module")
def reference(described):
    """The reference as the monitor reads it."""
    return Reference.parse(json.dumps(described))


def window(reference, num_rows, seed, **changes):
    """What the monitor says of a window, and the true error there."""
    inputs, truth = rows(num_rows, seed, **changes)
    sketch = Sketch(reference)
    outputs = answers(inputs)
    # In two parts, as from two replicas.
    other = Sketch(reference)
    sketch.add(inputs[::2], outputs[::2])
    other.add(inputs[1::2], outputs[1::2])
    sketch.merge(Sketch.from_json(reference, json.loads(json.dumps(other.to_json()))))
    judgement = judge(sketch)
    (performance,) = judgement.estimates
    findings = {f.kind for f in judgement.findings if f.counts}
    return performance, float(np.abs(outputs - truth).mean()), findings


@pytest.mark.parametrize("wind", [-0.7, 0.0, 0.4, 0.8])
def test_the_error_of_shifted_inputs_is_near_the_truth(reference, wind):
    """Errors that grow or fall because inputs moved are told to a tenth, without any label."""
    told = [window(reference, 2000, seed, wind=wind)[:2] for seed in range(10, 15)]
    estimates, truths = ([p.value for p, _ in told], [true for _, true in told])
    assert np.mean(estimates) == pytest.approx(np.mean(truths), rel=0.1)
    if wind > 0.3:
        # And so much nearer than to believe that nothing has changed.
        usual = told[0][0].reference
        assert abs(np.mean(estimates) - np.mean(truths)) < 0.25 * abs(usual - np.mean(truths))


def test_an_alarm_is_raised_for_harder_inputs_and_not_for_easier_ones(reference):
    """A large and sure growth of the error counts, what is as it was or better does not."""
    _, _, harder = window(reference, 500, 30, wind=1.0)
    assert AlarmKind.ESTIMATED_PERFORMANCE in harder
    for wind in (0.0, -1.0):
        _, _, findings = window(reference, 500, 31, wind=wind)
        assert AlarmKind.ESTIMATED_PERFORMANCE not in findings


def test_false_alarms_are_as_rare_as_their_probability_says(reference):
    """Where nothing has changed p-values are spread as p-values are."""
    values = np.array([window(reference, 500, 100 + n)[0].p_value for n in range(200)])
    assert (values < 0.01).mean() <= 0.04
    assert (values < 0.05).mean() <= 0.12
    assert 0.3 < values.mean() < 0.7


def test_noise_that_inputs_do_not_show_is_not_seen(reference):
    """That the same inputs have become harder only labels tell: the estimate stays."""
    performance, true, _ = window(reference, 4000, 50, noise=2.0)
    assert true > 1.7 * performance.value
    assert performance.value == pytest.approx(performance.reference, rel=0.1)


def test_few_rows_have_no_tree(described):
    """Then there is no estimate: nothing is said rather than something made up."""
    task = Load()
    inputs, truth = rows(150, 3)
    split = Split(inputs=inputs, targets=truth)
    given = describe(
        task,
        schema=infer_schema(split, task.columns),
        profile=profile_of(task, split),
        test=split,
        outputs=answers(inputs),
    )
    assert "losses" in described
    assert "losses" not in given
    found = Reference.parse(json.dumps(given))
    sketch = Sketch(found)
    sketch.add(inputs, answers(inputs))
    assert judge(sketch).estimates == ()
    assert found.only(Role.SCORE) is None


@pytest.mark.parametrize(
    "broken",
    [
        {"left": lambda tree: [0] * len(tree["left"])},  # a walk without an end
        {"columns": lambda tree: [99] * len(tree["columns"])},
        {"errors": lambda tree: tree["errors"][:-1]},
        {"counts": lambda tree: [0] * len(tree["counts"])},
        {"more": lambda tree: []},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_a_tree_that_is_none_is_refused(described, broken):
    """A reference from elsewhere cannot make the monitor walk in circles or look beside a row."""
    ((name, change),) = broken.items()
    losses = {**described["losses"], name: change(described["losses"])}
    with pytest.raises(ModelError, match="cannot be read"):
        Reference.parse(json.dumps({**described, "losses": losses}))
