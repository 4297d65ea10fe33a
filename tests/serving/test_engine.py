"""One model on onnxruntime: refused when it is loaded, or able to answer."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto

from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import BadRequestError, ModelError
from minga.inference.tensors import Datatype

ELEMENTS = {
    Datatype.BOOL: TensorProto.BOOL,
    Datatype.UINT8: TensorProto.UINT8,
    Datatype.UINT16: TensorProto.UINT16,
    Datatype.UINT32: TensorProto.UINT32,
    Datatype.UINT64: TensorProto.UINT64,
    Datatype.INT8: TensorProto.INT8,
    Datatype.INT16: TensorProto.INT16,
    Datatype.INT32: TensorProto.INT32,
    Datatype.INT64: TensorProto.INT64,
    Datatype.FP16: TensorProto.FLOAT16,
    Datatype.FP32: TensorProto.FLOAT,
    Datatype.FP64: TensorProto.DOUBLE,
    Datatype.BYTES: TensorProto.STRING,
}


@pytest.mark.parametrize("datatype", Datatype)
def test_every_datatype_passes_through_a_model(datatype, models, write_model):
    """A model of any datatype loads, says so in its metadata, and gives back what it got."""
    model = OnnxModel.load(write_model(models["identity"](ELEMENTS[datatype])))
    assert [spec.datatype for spec in model.inputs + model.outputs] == [datatype] * 2
    assert model.inputs[0].shape == (-1, 2)
    values = ["a", "ñ"] if datatype is Datatype.BYTES else [0, 1]
    array = np.array([values], dtype=datatype.dtype)
    output = model.run({"input": array})["output"]
    assert output.dtype == array.dtype
    assert output.tolist() == array.tolist()


def test_only_the_asked_outputs_are_computed(models, write_model):
    """Outputs come back by name, in the order they were asked for."""
    model = OnnxModel.load(write_model(models["sum"]()))
    inputs = {"left": np.ones((1, 2), np.float32), "right": np.full((1, 2), 3, np.float32)}
    assert list(model.run(inputs, outputs=["difference"])) == ["difference"]
    both = model.run(inputs, outputs=["difference", "sum"])
    assert {name: array.tolist() for name, array in both.items()} == {
        "difference": [[-2, -2]],
        "sum": [[4, 4]],
    }


def test_an_altered_file_is_refused(models, write_model):
    """A file whose digest is not the registered one is never opened as a model."""
    ref = replace(write_model(models["scaling"](1)), sha256="0" * 64)
    with pytest.raises(ModelError, match="altered"):
        OnnxModel.load(ref)


def test_a_missing_file_is_refused(models, write_model, tmp_path):
    """A file that is gone is one clear error with its path."""
    ref = replace(write_model(models["scaling"](1)), path=str(tmp_path / "gone.onnx"))
    with pytest.raises(ModelError, match=r"gone\.onnx"):
        OnnxModel.load(ref)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08" * 100])
def test_a_file_that_is_no_model_is_refused(content, write_model):
    """Bytes that onnxruntime cannot load are one clear error."""
    with pytest.raises(ModelError, match="no ONNX model"):
        OnnxModel.load(write_model(content))


def test_a_model_without_tensors_is_refused(models, write_model):
    """A sequence output, as some exporters make, is refused with a remedy."""
    with pytest.raises(ModelError, match="plain tensors"):
        OnnxModel.load(write_model(models["sequence"]()))


def test_a_model_that_cannot_compute_is_refused(models, write_model):
    """A model that fails on zeros is refused when it is loaded, not when a caller asks."""
    with pytest.raises(ModelError, match="self-test"):
        OnnxModel.load(write_model(models["failing"]()))


def test_the_self_test_finds_a_size_that_the_model_takes(models, write_model):
    """A model that needs more than one pixel is tested with more."""
    model = OnnxModel.load(write_model(models["image"]()))
    output = model.run({"input": np.ones((1, 1, 4, 5), np.float32)})["output"]
    assert output.shape == (1, 1, 2, 3)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        pytest.param({}, [], "takes inputs", id="none"),
        pytest.param({"other": np.ones((1, 3), np.float32)}, [], "takes inputs", id="wrong-name"),
        pytest.param(
            {"input": np.ones((1, 3), np.float32), "more": np.ones(1)},
            [],
            "takes inputs",
            id="more",
        ),
        pytest.param({"input": np.ones((1, 3))}, [], "must be FP32", id="wrong-type"),
        pytest.param({"input": np.ones((1, 4), np.float32)}, [], "must have shape", id="columns"),
        pytest.param({"input": np.ones(3, np.float32)}, [], "must have shape", id="rank"),
        pytest.param({"input": np.ones((1, 3), np.float32)}, ["no"], "gives outputs", id="output"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, outputs, message, models, write_model):
    """What does not fit the model's metadata never reaches onnxruntime."""
    model = OnnxModel.load(write_model(models["scaling"](1)))
    with pytest.raises(BadRequestError, match=message):
        model.run(inputs, outputs=outputs)


def test_values_that_the_model_cannot_compute_are_the_callers_error(models, write_model):
    """An index outside the table fails inside onnxruntime, and is reported as a bad request."""
    model = OnnxModel.load(write_model(models["gathering"]()))
    with pytest.raises(BadRequestError, match="cannot compute"):
        model.run({"input": np.array([7])})
    assert model.run({"input": np.array([2])})["output"].tolist() == [3]


@pytest.mark.parametrize(("name", "version"), [("", "1"), ("a/b", "1"), ("a", ""), ("a", "1/2")])
def test_names_that_no_url_can_carry_are_refused(name, version):
    """A model's name and version must be one part of a URL each."""
    with pytest.raises(ModelError, match="URL"):
        ModelRef(name=name, version=version, path="x", sha256="0")


def test_the_estimate_grows_with_the_request(models, write_model):
    """A longer request is guessed to take proportionally longer than the self-test's."""
    model = OnnxModel.load(write_model(models["scaling"](1)))
    assert 0 < model.estimate_s(0) < model.estimate_s(1000) < model.estimate_s(100_000)
