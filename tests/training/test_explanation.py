"""Explanations and fairness, against cases with a known answer."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

from minga.inference.errors import BadRequestError
from minga.inference.explaining import occlude
from minga.training.config import GateConfig
from minga.training.explanation import explain_by_gradients, explain_by_occlusion
from minga.training.fairness import measure_fairness
from minga.training.gates import judge
from minga.training.space import Maximize
from tests.training.test_gates import SOUND

WEIGHTS = np.array([2.0, -1.0, 0.0, 0.5])
BASE = np.array([1.0, 2.0, 3.0, 4.0])


@pytest.fixture
def rows():
    """Rows of four columns."""
    return np.random.default_rng(0).normal(size=(50, 4))


def test_occlusion_of_a_linear_model_is_exact(rows):
    """A linear model's shares are weight times distance from the baseline."""
    shares = occlude(lambda inputs: inputs @ WEIGHTS, rows, BASE)
    assert shares == pytest.approx(WEIGHTS * (rows - BASE))


def test_occlusion_explains_each_rows_own_answer(rows):
    """Where a model gives several outputs, the largest one is explained."""

    def predict(inputs):
        return np.stack([inputs @ WEIGHTS, -(inputs @ WEIGHTS)], axis=1)

    sign = np.sign(rows @ WEIGHTS)[:, None]
    assert occlude(predict, rows, BASE) == pytest.approx(sign * WEIGHTS * (rows - BASE))


def test_images_are_occluded_in_patches():
    """The patch that a model looks at has all of the share, the others none."""
    images = np.random.default_rng(0).random((5, 1, 28, 28)).astype(np.float32)
    shares = occlude(lambda one: one[:, 0, :3, :3].sum(axis=(1, 2)), images, np.float32(0))
    assert (shares[:, 0, :3, :3] > 0).all()
    assert not shares[:, 0, 4:, 4:].any()


def test_outputs_that_cannot_be_explained_are_refused(rows):
    """A model that gives a table for each row has no one answer."""
    with pytest.raises(BadRequestError, match="cannot be explained"):
        occlude(lambda inputs: np.zeros((len(inputs), 2, 2)), rows, BASE)


@pytest.fixture
def inputs(splits):
    """Rows of the well-behaved Task's test split."""
    return splits.test.inputs[:40]


def test_gradients_add_up_to_the_answers(blobs, splits, bundle_folder, inputs):
    """Each row's shares add up to its answer's distance from the baseline's."""
    found = explain_by_gradients(blobs, splits.train, bundle_folder, inputs)
    assert found.method == "gradients"
    assert found.completeness_gap < 0.01
    assert len(found.rows) == 40
    assert list(found.importance.values()) == sorted(found.importance.values(), reverse=True)


def test_both_methods_see_the_same(blobs, splits, bundle_folder, inputs):
    """Occlusion of the ONNX model and gradients of the network agree on what matters."""
    by_gradients = explain_by_gradients(blobs, splits.train, bundle_folder, inputs)
    by_occlusion = explain_by_occlusion(bundle_folder, inputs)
    flat = [np.ravel(one.rows) for one in (by_gradients, by_occlusion)]
    assert np.corrcoef(*flat)[0, 1] > 0.9
    assert by_occlusion.columns == ("x0", "x1", "x2", "x3")


def test_a_device_explains_without_torch(bundle_folder, inputs, tmp_path):
    """`minga explain --bundle` needs neither torch nor Ray nor MLflow, nor a project."""
    (tmp_path / "rows.json").write_text(json.dumps(inputs[:2].tolist()))
    code = (
        "import sys; from minga.cli.app import main\n"
        "class Barrier:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in {'torch', 'ray', 'mlflow', 'captum', 'sklearn'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Barrier())\n"
        "main(sys.argv[1:])\n"
    )
    words = ["explain", "--bundle", bundle_folder, "--input", tmp_path / "rows.json", "--json"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["method"], len(found["rows"])) == ("occlusion", 2)


def treated(num_examples=400, seed=0):
    """Groups, answers and truth: the model selects `b` more often."""
    generator = np.random.default_rng(seed)
    groups = generator.choice(["a", "b"], num_examples)
    truth = generator.random(num_examples) < 0.4
    probabilities = np.clip(0.3 * truth + 0.3 * (groups == "b") + 0.4 * generator.random(400), 0, 1)
    return groups, probabilities, truth.astype(np.float32)


def test_gaps_are_those_of_fairlearn():
    """Differences between groups are demographic parity's and equalised odds' own."""
    groups, probabilities, truth = treated()
    found = measure_fairness("sex", groups, probabilities, truth, min_examples=30)
    words = {"y_true": truth, "y_pred": probabilities > 0.5, "sensitive_features": groups}
    assert found.selection_gap == pytest.approx(demographic_parity_difference(**words))
    assert found.odds_gap == pytest.approx(equalized_odds_difference(**words))
    assert found.selection_gap > 0.2
    assert sum(group["examples"] for group in found.groups.values()) == 400


def test_groups_of_a_few_are_told_not_compared():
    """A group of one example is in the table and in no difference; what it lacks is no zero."""
    groups, probabilities, truth = treated()
    groups = np.where(np.arange(400) == 0, "c", groups)
    truth[0] = 0
    found = measure_fairness("sex", groups, probabilities, truth, min_examples=30)
    assert found.groups["c"]["true_positive_rate"] is None
    alone = measure_fairness("sex", groups[1:], probabilities[1:], truth[1:], min_examples=30)
    assert found.selection_gap == alone.selection_gap


def test_biased_model_is_blocked():
    """A limit on the gap refuses a model that treats groups unequally; without one it is told."""
    groups, probabilities, truth = treated()
    found = measure_fairness("sex", groups, probabilities, truth, min_examples=30)
    biased = replace(SOUND, fairness=(found,))
    assert judge(biased, GateConfig(), Maximize("auc")).blessed
    limits = GateConfig(max_selection_gap=0.1, max_odds_gap=0.1)
    report = judge(biased, limits, Maximize("auc"))
    assert [gate.name for gate in report.refused] == ["selection gap by sex", "odds gap by sex"]
    assert report.fairness == (found,)


def test_groups_are_slices_too(blobs, splits):
    """A Task that names groups need not name them as slices again."""

    class Grouped(type(blobs)):
        def groups(self, split):
            return {"sign": np.where(split.inputs[:, 0] > 0, "plus", "minus")}

    masks = Grouped().slices(splits.test)
    assert masks.keys() == {"sign=plus", "sign=minus"}
    assert sum(mask.sum() for mask in masks.values()) == len(splits.test)
    assert not blobs.slices(splits.test)
