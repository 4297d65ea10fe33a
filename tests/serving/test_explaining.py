"""Explanations: exact where the truth is known, bounded in cost, clear where there are none."""

import hashlib
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from minga.federation.device.slots import ModelSlots
from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.engine import ModelRef
from minga.inference.errors import RejectedError
from minga.inference.explaining import occluded, regions_of
from minga.inference.grpc_client import GrpcClient
from minga.inference.limits import Limits
from minga.inference.monitor.reference import Role
from minga.inference.repository import ModelRepository
from tests.serving import watched
from tests.serving.conftest import build_model
from tests.serving.test_app import assert_refused, connect
from tests.serving.test_commands import run
from tests.serving.watched import reference, rows, watched_model

WEIGHTS = np.array([[1.0, 2.0], [-3.0, 0.0], [0.5, 4.0]], np.float32)
EXPLAIN = "/v2/models/linear/explain"


def linear_model() -> bytes:
    """A model of which every attribution is known: output = input @ WEIGHTS."""
    return build_model(
        [helper.make_node("MatMul", ["input", "weights"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )


def request_of(rows, **parameters) -> dict:
    """A request in JSON."""
    rows = np.asarray(rows, np.float32)
    tensor = {"name": "input", "datatype": "FP32", "shape": rows.shape, "data": rows.tolist()}
    return {"inputs": [tensor], "parameters": parameters}


def test_a_linear_model_is_explained_exactly(make_app, serve):
    """A feature adds its weight times its distance from the baseline, for each output and row."""
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(50, 3)).astype(np.float32)
    baseline = [0.5, -1.0, 2.0]
    app = make_app(Limits(max_batch_rows=16), linear=linear_model())
    with serve(app) as url, InferenceClient(url) as client:
        found = client.explain("linear", {"input": rows}, baseline=baseline)["output"]
    expected = (rows - np.array(baseline, np.float32))[:, :, None] * WEIGHTS
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_baseline_is_that_of_the_training_data(write_model, serve):
    """Where the model's source knows the means, the request need not say them."""
    ref = write_model(linear_model(), "linear")
    known = ModelRef(
        name="linear", version="1", path=ref.path, sha256=ref.sha256, baseline=(1.0, 1.0, 1.0)
    )
    repository = ModelRepository()
    repository.apply([known])
    rows = np.array([[1, 1, 1], [2, 1, 0]], np.float32)
    with serve(InferenceApp(repository)) as url, InferenceClient(url) as client:
        found = client.explain("linear", {"input": rows})["output"]
        shifted = client.explain("linear", {"input": rows}, baseline=[2, 1, 0])["output"]
    assert found[0].tolist() == [[0, 0], [0, 0], [0, 0]]
    assert found[1].tolist() == [[1, 2], [0, 0], [-0.5, -4]]
    assert shifted[1].tolist() == [[0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "no reference profile"),
        ({"baseline": [1, 2]}, "2 numbers for 3"),
        ({"baseline": "mean"}, "list of numbers"),
        ({"baseline": [1, 2, None]}, "list of numbers"),
        ({"baseline": [1, 2, True]}, "list of numbers"),
        ({"baseline": [1, 2, 1e300]}, "no float32"),
    ],
)
async def test_a_baseline_that_does_not_fit_is_refused(parameters, words, make_app):
    """Each says what is wrong with it."""
    async with connect(make_app(linear=linear_model())) as client:
        response = await client.post(EXPLAIN, json=request_of([[1, 2, 3]], **parameters))
    assert_refused(response, 400)
    assert words in response.json()["error"]


async def test_the_cost_is_bounded(make_app):
    """Rows times features are limited, and the error says to what."""
    async with connect(make_app(linear=linear_model())) as client:
        body = request_of(np.zeros((4097, 3)), baseline=[0, 0, 0])
        refused = await client.post(EXPLAIN, json=body)
        body = request_of(np.zeros((4096, 3)), baseline=[0, 0, 0])
        answered = await client.post(EXPLAIN, json=body)
    assert_refused(refused, 400)
    assert "16384" in refused.json()["error"]
    assert answered.status_code == 200
    assert answered.json()["outputs"][0]["shape"] == [4096, 3, 2]


@pytest.mark.parametrize("max_rows", [1, 2, 7, 64])
@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 9, 9), (1, 1), (0, 3)])
def test_pieces_are_the_rows_and_each_region_at_its_baseline(max_rows, shape):
    """However small the pieces, joined they are the rows, and then again without each region."""
    rows = np.random.default_rng(1).normal(size=shape)
    baseline = np.full(shape[1:], -7.0)
    wanted = [rows]
    for region in regions_of(shape[1:]):
        wanted.append(rows.copy())
        wanted[-1][slice(None), *region] = -7.0
    pieces = list(occluded(rows, baseline, max_rows=max_rows))
    assert all(len(piece) <= max_rows for piece in pieces)
    np.testing.assert_array_equal(np.concatenate([rows[:0], *pieces]), np.concatenate(wanted))


def test_a_wide_row_does_not_fill_the_memory():
    """A row of 4,000 features is 16 KB and its variants are 64 MB, of which a piece is there."""
    rows, baseline = np.ones((1, 4000), np.float32), np.zeros(4000, np.float32)
    tracemalloc.start()
    try:
        assert sum(map(len, occluded(rows, baseline, max_rows=64))) == 4001
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("kind", ["sum", "image", "gathering"])
async def test_models_without_a_table_are_not_explained(kind, make_app, models):
    """Several inputs, images and lists have no features to leave out."""
    shapes = {
        "sum": [("left", "FP32", [1, 2]), ("right", "FP32", [1, 2])],
        "image": [("input", "FP32", [1, 1, 3, 3])],
        "gathering": [("input", "INT64", [1])],
    }
    inputs = [
        {"name": name, "datatype": datatype, "shape": shape, "data": [0] * int(np.prod(shape))}
        for name, datatype, shape in shapes[kind]
    ]
    async with connect(make_app(**{kind: models[kind]()})) as client:
        response = await client.post(f"/v2/models/{kind}/explain", json={"inputs": inputs})
    assert_refused(response, 400)
    assert "one table of numbers" in response.json()["error"]


async def test_what_is_wrong_with_a_request_is_said_as_for_inference(make_app):
    """Unknown models, wrong shapes and bodies that are no requests have the same statuses."""
    async with connect(make_app(linear=linear_model())) as client:
        body = request_of([[1, 2]], baseline=[0, 0])
        assert_refused(await client.post(EXPLAIN, json=body), 400)
        assert_refused(await client.post(EXPLAIN, content=b"{"), 400)
        assert_refused(await client.post("/v2/models/no/explain", content=b"{"), 404)
        assert_refused(await client.get(EXPLAIN), 405)
        empty = await client.post(EXPLAIN, json=request_of(np.zeros((0, 3)), baseline=[0, 0, 0]))
    assert empty.status_code in (200, 400)


def test_a_device_explains_with_the_means_in_the_models_file(tmp_path, serve):
    """It knows no more of a model than the file in its slot, whose reference has them."""
    content, slots = watched_model(), ModelSlots(tmp_path)
    slots.idle_path("yes-or-no").write_bytes(content)
    slots.activate("yes-or-no", "1", hashlib.sha256(content).digest())
    repository = ModelRepository()
    repository.apply(slots.active())
    asked = rows(2, 5)
    means = [column.mean for column in reference().of_role(Role.INPUT)]
    with serve(InferenceApp(repository)) as url, InferenceClient(url) as client:
        found = client.explain("yes-or-no", {"input": asked})["output"]
    np.testing.assert_allclose(found, (asked - np.float32(means)) * watched.WEIGHTS, atol=1e-4)


def test_both_wires_explain_alike(make_app, serve):
    """A service of its own answers gRPC, and refuses as HTTP does."""
    asked = np.array([[1, 2, 3], [0, 1, 0]], np.float32)
    with serve(make_app(linear=linear_model()), grpc=True) as url, GrpcClient(url) as client:
        found = client.explain("linear", {"input": asked}, baseline=[1, 1, 1])
        other = client.explain("linear", {"input": asked}, baseline=[0, 0, 0], version="1")
        for words, status, model, wrong in (
            ("no reference profile", 400, "linear", {}),
            ("2 numbers for 3", 400, "linear", {"baseline": [1, 2]}),
            ("gives outputs", 400, "linear", {"baseline": [1, 1, 1], "outputs": ["no"]}),
            ("no model", 404, "no", {"baseline": [1, 1, 1]}),
        ):
            with pytest.raises(RejectedError, match=words) as refused:
                client.explain(model, {"input": asked}, **wrong)
            assert refused.value.status == status
    np.testing.assert_allclose(found["output"], (asked - 1)[:, :, None] * WEIGHTS, atol=1e-6)
    np.testing.assert_allclose(other["output"], asked[:, :, None] * WEIGHTS, atol=1e-6)


@pytest.mark.parametrize("grpc", [False, True])
def test_predict_explains(write_model, serve, tmp_path, capsys, grpc):
    """`--explain` shows what each feature adds, on either wire."""
    ref = replace(write_model(linear_model(), "linear"), baseline=(0.0, 0.0, 0.0))
    repository = ModelRepository()
    repository.apply([ref])
    file = tmp_path / "rows.json"
    file.write_text("[[1, 2, 3]]")
    words = ["predict", "linear", "--input", str(file), "--explain"]
    with serve(InferenceApp(repository), grpc=grpc) as url:
        run(*words, "--url", url, "--json")
        answered = json.loads(capsys.readouterr().out)
        run(*words, "--url", url)
        shown = capsys.readouterr().out
    assert answered["outputs"] == {"output": [[[1, 2], [-6, 0], [1.5, 12]]]}
    assert "1.5  12" in shown


def test_predict_says_what_an_explanation_needs(make_app, serve, tmp_path, capsys):
    """Without a profile on the server it ends with the server's reason."""
    from minga.cli.app import main

    file = tmp_path / "rows.json"
    file.write_text("[[1, 2, 3]]")
    with serve(make_app(linear=linear_model())) as url, pytest.raises(SystemExit) as ending:
        main(["predict", "linear", "--input", str(file), "--url", url, "--explain"])
    assert ending.value.code == 24
    assert "no reference profile" in capsys.readouterr().err
