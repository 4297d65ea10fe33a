"""One preparation in training, serving and on devices."""

import csv
import gzip
import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import BadRequestError
from minga.training import Maximize, Split, Splits, Task
from minga.training.candidate import latency_ms
from minga.training.data import matrix, read_table
from minga.training.errors import TaskError
from minga.training.export import run_onnx, to_onnx
from minga.training.federated import TaskTrainer
from minga.training.models import NetworkModel, largest_gap
from minga.training.network import build_network, parameters_of
from minga.training.preparation import PrepareTable, Standardize, default_preparation
from minga.training.texts import numbers_of, texts_of
from minga.training.tracking import save_mlflow_model

AI4I = Path(__file__).parents[3] / "shared" / "data" / "ai4i2020.csv.gz"
COLUMNS = ("type", "air_temp_k", "process_temp_k", "speed_rpm", "torque_nm", "tool_wear_min")
CATEGORIES = {"type": ("L", "M", "H")}


class Machine(Task):
    """Tell failures from text and numbers."""

    name = "machine"
    columns = COLUMNS
    categories = CATEGORIES
    objective = Maximize("accuracy")

    def data(self, source):
        raise NotImplementedError

    def model(self, params):
        return nn.Sequential(nn.Linear(self.width, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))

    def loss(self, outputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}


def made_cells(num_rows=10_000):
    """Cells as a CSV has them: decimals of many lengths, holes, unknown categories."""
    generator = np.random.default_rng(5)
    cells = np.empty((num_rows, len(COLUMNS)), object)
    cells[:, 0] = generator.choice(
        ["L", "M", "H", "", "X"], num_rows, p=[0.5, 0.3, 0.1, 0.05, 0.05]
    )
    for place in range(1, len(COLUMNS)):
        digits = generator.integers(0, 17, num_rows)
        values = generator.normal(300, 10.0**place, num_rows)
        cells[:, place] = [f"{value:.{d}f}" for value, d in zip(values, digits, strict=True)]
        cells[generator.random(num_rows) < 0.02, place] = ""
    return cells


def real_cells():
    """The cells of a real file."""
    with gzip.open(AI4I, "rt", newline="") as file:
        return np.array([[row[name] for name in COLUMNS] for row in csv.DictReader(file)], object)


@pytest.fixture(
    params=[
        "made",
        pytest.param(
            "ai4i2020",
            marks=pytest.mark.skipif(not AI4I.exists(), reason="../shared/data is not there"),
        ),
    ]
)
def cells(request):
    """10,000 rows of text."""
    return made_cells() if request.param == "made" else real_cells()


def split_of(cells, folder):
    """Read cells as training does: from a CSV file, through the table, to numbers."""
    file = folder / "cells.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([COLUMNS, *cells])
    inputs = matrix(read_table(str(file)), COLUMNS, CATEGORIES)
    return Split(inputs=inputs, targets=(np.arange(len(inputs)) % 2).astype(np.float32))


def network_of(split):
    """The preparation alone as a network."""
    preparation = default_preparation(split, COLUMNS, CATEGORIES)
    return nn.Sequential(OrderedDict(preparation=preparation, model=nn.Identity()))


def test_training_and_serving_prepare_byte_for_byte(cells, tmp_path):
    """On 10,000 rows the served model makes of a file's cells the very bytes that training does."""
    split = split_of(cells, tmp_path)
    network = network_of(split)
    trained = network(torch.from_numpy(split.inputs)).numpy()
    onnx = to_onnx(network, split.inputs)
    served = serve(onnx).run({"input": cells})["output"]
    assert len(served) == 10_000
    assert served.dtype == trained.dtype
    assert served.tobytes() == trained.tobytes()
    # The gates give numbers, which are written out as text first.
    assert run_onnx(onnx, split.inputs).tobytes() == trained.tobytes()


def serve(onnx):
    """Open a model as servers and devices do."""
    digest = hashlib.sha256(onnx).hexdigest()
    return OnnxModel(ModelRef(name="machine", version="1", path="m", sha256=digest), onnx)


def test_numbers_alone_prepare_byte_for_byte(tmp_path):
    """A table of numbers is prepared alike too, missing values included."""
    inputs = np.random.default_rng(0).normal(300, 50, (10_000, 5)).astype(np.float32)
    inputs[::7, 2] = np.nan
    network = nn.Sequential(
        OrderedDict(preparation=Standardize.fitted(inputs), model=nn.Identity())
    )
    trained = network(torch.from_numpy(inputs)).numpy()
    assert run_onnx(to_onnx(network, inputs), inputs).tobytes() == trained.tobytes()
    assert np.isfinite(trained).all()


def test_preparation_is_fitted_on_present_training_values():
    """Means and deviations are those of the training split; a hole becomes the mean."""
    train = Split(inputs=np.array([[1.0], [3.0], [np.nan]]), targets=np.zeros(3))
    prepared = default_preparation(train)(torch.from_numpy(train.inputs))
    assert prepared.flatten().tolist() == [-1, 1, 0]


def test_categories_are_columns(tmp_path):
    """Each declared value is a column; an unknown or missing one is none of them."""
    table = pa.table({"type": ["H", "X", None], "x": [1.0, 2.0, 3.0]})
    inputs = matrix(table, ("type", "x"), CATEGORIES)
    train = Split(inputs=inputs, targets=np.zeros(3))
    prepared = default_preparation(train, ("type", "x"), CATEGORIES)
    assert isinstance(prepared, PrepareTable)
    assert prepared.width == 4
    out = prepared(torch.from_numpy(inputs))
    assert out[:, 1:].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_whole_network_agrees_and_takes_text(tmp_path):
    """The gates' parity and latency work on a model of text, and MLflow keeps it."""
    split = split_of(made_cells(500), tmp_path)
    task = Machine()
    network = build_network(task, {}, split, seed=0)
    onnx = to_onnx(network, split.inputs)
    assert (
        largest_gap(NetworkModel(network, split.inputs), run_onnx(onnx, split.inputs), split.inputs)
        < 1e-4
    )
    assert 0 < latency_ms(onnx, split.inputs) < 1000
    save_mlflow_model(onnx, tmp_path / "bundle")
    assert task.schema(split).served_dtype == "string"
    assert to_onnx(network, split.inputs) == onnx


def test_text_that_is_no_number_is_refused(tmp_path):
    """A cell that is no number is the caller's mistake, and says so."""
    split = split_of(made_cells(50), tmp_path)
    model = serve(to_onnx(network_of(split), split.inputs))
    with pytest.raises(BadRequestError, match="cannot compute from these inputs"):
        model.run({"input": np.array([["L", "warm", "1", "1", "1", "1"]], object)})


def test_sites_with_other_categories_share_a_network(tmp_path):
    """A site that never saw a category trains the same parameters as one that saw only it."""
    trainers = []
    for kind in ("L", "H"):
        cells = made_cells(80)
        cells[:, 0] = kind
        split = split_of(cells, tmp_path)
        trainers.append(TaskTrainer(Machine(), Splits(train=split, validation=split, test=split)))
    first = trainers[0].initial({})
    updates = [trainer.fit(first, {"epochs": 1}) for trainer in trainers]
    shapes = [{name: delta.shape for name, delta in update.delta.items()} for update in updates]
    assert shapes[0] == shapes[1]
    assert all(not update.delta["preparation.mean"].any() for update in updates)


def test_categories_of_no_column_are_refused():
    """Declaring categories for a column that is not named is explained."""
    train = Split(inputs=np.zeros((3, 2), np.float32), targets=np.zeros(3))
    with pytest.raises(TaskError, match="declared for type, columns are a, b"):
        default_preparation(train, ("a", "b"), CATEGORIES)


def test_same_split_gives_the_same_parameters(tmp_path):
    """Only means, deviations and weights are parameters; declared values do not travel."""
    split = split_of(made_cells(50), tmp_path)
    names = parameters_of(build_network(Machine(), {}, split, seed=0))
    assert {name for name in names if name.startswith("preparation.")} == {
        "preparation.mean",
        "preparation.scale",
    }


def test_texts_and_numbers_are_translated_both_ways():
    """What clients send is read as the numbers that it stands for, as the model reads it."""
    texts = {1: ("a", "b")}
    numbers = np.array([[1.5, 0], [np.nan, 1], [-2, np.nan]], np.float32)
    cells = texts_of(numbers, texts)
    assert cells.tolist() == [["1.5", "a"], ["", "b"], ["-2.0", ""]]
    assert np.array_equal(numbers_of(cells, texts), numbers, equal_nan=True)
    assert numbers_of(np.array([[b"3", b"z"]], object), texts).tolist() == [[3.0, -1.0]]
    with pytest.raises(ValueError, match="could not convert"):
        numbers_of(np.array([["high", "a"]], object), texts)
