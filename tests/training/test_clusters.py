"""Tasks that look for groups, with k-means and with a mixture of Gaussians."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from minga.inference.monitor.judgement import AlarmKind, judge
from minga.inference.monitor.reference import METADATA_KEY, Reference
from minga.inference.monitor.sketch import Sketch
from minga.training.candidate import Champion, assess
from minga.training.clusters import ClusterTask, clusters_of, simplified_silhouette
from minga.training.config import GateConfig, TrainConfig
from minga.training.data import profile_of
from minga.training.errors import TaskError
from minga.training.export import run_onnx, session
from minga.training.models import largest_gap
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.probe import probe
from minga.training.selection.contenders import contender_of, contenders_of, params_of

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "find-clusters.md"
CONFIG = TrainConfig(epochs=6)
KINDS = (((90, 20, 60), "round"), ((40, 80, 60), "square"), ((60, 50, 120), "round"))
SPREAD = (4.0, 5.0, 6.0)
SHARES = (0.5, 0.3, 0.2)


def strokes(num_rows, seed=0, shares=SHARES):
    """Rows of a press that works in three ways, some readings missing; and the ways."""
    generator = np.random.default_rng(seed)
    kinds = generator.choice(3, num_rows, p=shares)
    rows = []
    for kind in kinds:
        middle, tool = KINDS[kind]
        values = [f"{value:.3f}" for value in generator.normal(middle, SPREAD)]
        if generator.random() < 0.02:
            values[generator.integers(3)] = ""
        rows.append([*values, tool])
    return rows, kinds


@pytest.fixture(scope="module")
def presses(tmp_path_factory):
    """The Task that the page shows, as it stands there, with its data."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    names = {"__name__": "page"}
    exec(code, names)
    task = names["Presses"]()
    file = tmp_path_factory.mktemp("presses") / "strokes.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([task.columns, *strokes(1500)[0]])
    return task, task.data(str(file))


@pytest.fixture(scope="module", params=["own", "gaussian-mixture"])
def fitted(request, presses):
    """A model that was fitted."""
    task, splits = presses
    return contenders_of(task, CONFIG)[request.param].fit(splits.train, splits.validation, seed=1)


def judged(task, splits, model, *, champion=None):
    """What the gates say of a model."""
    config = GateConfig(
        floors={"silhouette": 0.5, "smallest": 0.1},
        max_missing_loss=1.0,
        max_noise_loss=1.0,
        num_resamples=100,
    )
    return assess(
        task,
        model,
        splits.test,
        schema=task.schema(splits.train),
        profile=profile_of(task, splits.train),
        champion=champion,
        config=config,
        seed=1,
    )


@pytest.fixture(scope="module")
def candidate(presses, fitted):
    """The exported model and the verdict on it."""
    return judged(*presses, fitted)


def test_groups_are_found_without_labels(presses, fitted):
    """The three ways of working are told apart, though nobody told of them."""
    task, _ = presses
    rows, kinds = strokes(500, seed=9)
    tools = task.categories["tool"]
    inputs = [[float(v) if v else np.nan for v in row[:3]] + [tools.index(row[3])] for row in rows]
    outputs = fitted.predict(np.array(inputs, np.float32))
    assert adjusted_rand_score(kinds, outputs[:, 0]) > 0.97
    assert (outputs[:, 1] > 0).all()
    assert ((outputs[:, 2] >= 0) & (outputs[:, 2] <= 1)).all()


def test_strangers_are_rare_and_are_told(presses, fitted):
    """Of ordinary rows few are strangers; rows that fit nowhere are."""
    task, splits = presses
    metrics = task.metrics(fitted.predict(splits.test.inputs), splits.test.targets)
    assert metrics["strangers"] < 0.05
    nowhere = np.array([[10, 10, 10, 0], [200, 200, 200, 1]], np.float32)
    assert (fitted.predict(nowhere)[:, 1] > 1).all()


def test_gates_and_export_hold(presses, fitted, candidate):
    """The exported model, texts and radius inside, gives the same and passes the gates."""
    _, splits = presses
    assert candidate.report.blessed, [str(gate) for gate in candidate.report.refused]
    outputs = run_onnx(candidate.onnx, splits.test.inputs)
    assert outputs.shape == (len(splits.test), 3)
    assert largest_gap(fitted, outputs, splits.test.inputs) < 1e-4


def test_gates_hold_a_worse_candidate_against_the_champion(presses):
    """Too many clusters cut one way of working in two: the interval tells, and it is refused."""
    task, splits = presses
    good, bad = (
        contender_of(task, {**task.defaults, "clusters": number}, CONFIG).fit(
            splits.train, splits.validation, seed=1
        )
        for number in (3, 8)
    )
    schema = task.schema(splits.train)
    champion = Champion(version=1, onnx=judged(task, splits, good).onnx, schema=schema)
    refused = {gate.name for gate in judged(task, splits, bad, champion=champion).report.refused}
    assert "silhouette against champion" in refused


def test_shares_of_clusters_are_watched(presses, fitted, candidate):
    """When one way of working comes more often the monitor says so of `cluster`, else nothing."""
    task, _ = presses
    reference = Reference.of_metadata(session(candidate.onnx).get_modelmeta().custom_metadata_map)
    assert reference is not None, METADATA_KEY

    def alarming(shares):
        rows = np.array(strokes(2000, seed=5, shares=shares)[0], object)
        rows[rows == ""] = "nan"
        sketch = Sketch(reference)
        inputs = np.array(rows, str).astype(object)
        sketch.add(inputs, fitted.predict(_numbers(task, inputs)))
        return {(f.kind, f.subject) for f in judge(sketch).findings if f.counts}

    assert (AlarmKind.PREDICTION_DRIFT, "cluster") not in alarming(SHARES)
    assert (AlarmKind.PREDICTION_DRIFT, "cluster") in alarming((0.2, 0.2, 0.6))


def _numbers(task, rows):
    tools = task.categories["tool"]
    return np.array([[*map(float, row[:3]), tools.index(row[3])] for row in rows], np.float32)


def test_one_step_works_and_is_refused_with_one_cluster(presses):
    """What is checked before Ray is started; a single cluster is said to be too few."""
    task, splits = presses
    probe(task, task.defaults, splits)
    with pytest.raises(TaskError, match="two is the least"):
        probe(task, {**task.defaults, "clusters": 1}, splits)


def test_a_device_with_few_rows_takes_the_centres_that_come(presses):
    """Fewer rows than clusters give no centres, and those of the fleet's model go in."""
    task, splits = presses
    central = build_network(task, task.defaults, splits.train, seed=1)
    few = task.divided(splits.train.inputs[:5]).validation
    local = build_network(task, task.defaults, few, seed=1)
    load_parameters(local, parameters_of(central))
    assert np.array_equal(
        clusters_of(local).centres.detach().numpy(), clusters_of(central).centres.detach().numpy()
    )


def test_the_number_of_clusters_goes_with_the_mixture(presses):
    """What a search has found is kept when the mixture is chosen by its name alone."""
    task, _ = presses
    found = {**task.defaults, "clusters": 6}
    assert params_of(task, "gaussian-mixture", found) == {
        "clusters": 6,
        "architecture": "gaussian-mixture",
    }
    assert set(contenders_of(task, CONFIG)) == {"own", "gaussian-mixture"}


def test_silhouettes_are_those_of_the_definition():
    """Two pairs of points, by hand; near scikit-learn's full one on clear groups; the edges."""
    rows = np.array([[0.0], [2.0], [10.0], [12.0]])
    # The middles are 1 and 11: to the own one it is 1 from everywhere, to the other 11 or 9.
    expected = np.mean([10 / 11, 8 / 9, 8 / 9, 10 / 11])
    assert simplified_silhouette(np.array([0, 0, 1, 1]), rows) == pytest.approx(expected)
    alone = simplified_silhouette(np.array([0, 0, 0, 5]), rows)  # the middles are 4 and 12
    assert alone == pytest.approx(np.mean([8 / 12, 8 / 10, -4 / 6, 0]))
    assert np.isnan(simplified_silhouette(np.zeros(4, int), rows))
    generator = np.random.default_rng(0)
    numbers = np.repeat([0, 1, 2], 100)
    table = generator.normal(size=(300, 2)) + 8 * np.eye(3, 2)[numbers]
    full = silhouette_score(table, numbers)
    assert simplified_silhouette(numbers, table) == pytest.approx(full, abs=0.1)
    assert simplified_silhouette(generator.permutation(numbers), table) < 0.1


def test_training_moves_centres_to_the_middle_of_their_rows(presses):
    """After training a centre is where the rows are that belong to it, as in Lloyd's k-means."""
    task, splits = presses
    model = contenders_of(task, CONFIG)["own"].fit(splits.train, splits.validation, seed=1)
    outputs = model.predict(splits.train.inputs)
    centres = clusters_of(model._network).centres.detach().numpy()
    for number, centre in enumerate(centres):
        middle = splits.train.targets[outputs[:, 0] == number].mean(axis=0)
        assert np.linalg.norm(centre - middle) < 0.15


def test_a_task_of_ones_own_model_needs_no_centres(presses):
    """A model of another kind is left as it is, before training and after."""
    import torch

    class Halves(torch.nn.Module):
        def forward(self, rows):
            left = rows[:, 0]
            return torch.stack([(left > 0).to(left.dtype), left.abs(), left.abs()], dim=1)

    class Other(ClusterTask):
        name = "other"
        columns = ("a", "b")

        def data(self, source):
            return self.divided(np.random.default_rng(1).normal(size=(50, 2)))

        def model(self, params):
            return Halves()

    task = Other()
    splits = task.data("")
    network = build_network(task, task.defaults, splits.train, seed=1)
    task.finish(network, splits.validation)
    assert clusters_of(network) is None
