"""Bodies of the Open Inference Protocol: what one side writes, the other reads."""

import hypothesis.extra.numpy as arrays
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.inference.errors import BadRequestError
from minga.inference.protocol import (
    InferRequest,
    InferResponse,
    Message,
    RequestedOutput,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from minga.inference.tensors import Datatype, TensorSpec

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
TENSORS = st.dictionaries(
    NAMES,
    arrays.arrays(
        st.sampled_from([np.float32, np.int64, np.bool_, np.uint8]),
        arrays.array_shapes(min_dims=0, min_side=0, max_side=3),
    ),
    min_size=1,
    max_size=3,
)


def finite(tensors):
    """Tell whether JSON can carry the tensors."""
    return all(array.dtype.kind != "f" or np.isfinite(array).all() for array in tensors.values())


def assert_same(left, right):
    """Compare tensors by name, order, type, shape and value."""
    assert list(left) == list(right)
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name])
        assert array.dtype == right[name].dtype


@given(TENSORS, st.none() | NAMES, st.booleans(), st.booleans())
def test_requests_round_trip(tensors, request_id, binary, binary_outputs):
    """A request reads back as it was written, with raw and with JSON tensors."""
    if not (binary or finite(tensors)):
        return
    outputs = (RequestedOutput(name="a", binary=True), RequestedOutput(name="b"))
    sent = InferRequest(
        inputs=tensors, outputs=outputs, id=request_id, binary_outputs=binary_outputs
    )
    received = decode_request(encode_request(sent, binary=binary))
    assert_same(received.inputs, tensors)
    assert received.outputs == outputs
    assert received.id == request_id
    assert received.binary_outputs is binary_outputs


@given(TENSORS, st.data())
def test_responses_round_trip_with_mixed_forms(tensors, data):
    """A response reads back as it was written, whichever of its outputs were asked for raw."""
    forms = {name: data.draw(st.booleans(), label=name) for name in tensors}
    if not finite({name: array for name, array in tensors.items() if not forms[name]}):
        return
    request = InferRequest(
        inputs={},
        outputs=tuple(RequestedOutput(name=name, binary=raw) for name, raw in forms.items()),
    )
    sent = InferResponse(model_name="m", model_version="2", outputs=tensors, id="7")
    message = encode_response(sent, request)
    received = decode_response(message)
    assert_same(received.outputs, tensors)
    assert (received.model_name, received.model_version, received.id) == ("m", "2", "7")
    assert (message.json_size is not None) is any(forms.values())


def test_the_per_output_wish_wins_over_the_one_for_all():
    """`binary_data` of an output overrides `binary_data_output` of the request, both ways."""
    request = InferRequest(
        inputs={},
        outputs=(RequestedOutput(name="json", binary=False), RequestedOutput(name="raw")),
        binary_outputs=True,
    )
    assert not request.wants_binary("json")
    assert request.wants_binary("raw")


@pytest.mark.parametrize(
    ("shape", "body", "wanted"),
    [
        pytest.param((-1, 2), bytes(24), (3, 2), id="batch-from-the-size"),
        pytest.param((2, 2), bytes(16), (2, 2), id="fixed-shape"),
        pytest.param((-1,), b"", (0,), id="empty"),
        pytest.param((), bytes(4), (), id="scalar"),
    ],
)
def test_raw_requests_take_their_shape_from_the_model(shape, body, wanted):
    """A raw request's one variable dimension follows from its size, and it is answered raw."""
    spec = TensorSpec(name="x", datatype=Datatype.FP32, shape=shape)
    request = decode_request(Message(body=body, json_size=0), raw_inputs=[spec])
    assert request.inputs["x"].shape == wanted
    assert request.wants_binary("anything")


@pytest.mark.parametrize(
    ("specs", "body"),
    [
        pytest.param([], b"", id="no-input"),
        pytest.param([((-1,), "FP32")] * 2, bytes(4), id="two-inputs"),
        pytest.param([((-1, -1), "FP32")], bytes(4), id="two-variable-dimensions"),
        pytest.param([((-1,), "BYTES")], bytes(4), id="variable-strings"),
        pytest.param([((-1, 2), "FP32")], bytes(12), id="half-a-row"),
        pytest.param([((-1, 0), "FP32")], bytes(4), id="nothing-per-row"),
    ],
)
def test_raw_requests_that_are_refused(specs, body):
    """A raw request whose shape cannot be told is refused."""
    inputs = [TensorSpec(name="x", datatype=Datatype(kind), shape=dims) for dims, kind in specs]
    with pytest.raises(BadRequestError):
        decode_request(Message(body=body, json_size=0), raw_inputs=inputs)


GOOD = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}
RAW = {"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}


@pytest.mark.parametrize(
    ("content", "tail"),
    [
        pytest.param([], b"", id="list-for-object"),
        pytest.param({}, b"", id="no-inputs"),
        pytest.param({"inputs": []}, b"", id="empty-inputs"),
        pytest.param({"inputs": {}}, b"", id="object-for-inputs"),
        pytest.param({"inputs": ["x"]}, b"", id="string-for-tensor"),
        pytest.param({"inputs": [GOOD, GOOD]}, b"", id="same-input-twice"),
        pytest.param({"inputs": [GOOD | {"name": ""}]}, b"", id="empty-name"),
        pytest.param({"inputs": [GOOD | {"name": 1}]}, b"", id="number-for-name"),
        pytest.param({"inputs": [GOOD | {"parameters": []}]}, b"", id="list-for-parameters"),
        pytest.param({"inputs": [GOOD], "id": 1}, b"", id="number-for-id"),
        pytest.param({"inputs": [GOOD], "parameters": 1}, b"", id="number-for-parameters"),
        pytest.param(
            {"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, b"", id="number-for-flag"
        ),
        pytest.param({"inputs": [GOOD], "outputs": {}}, b"", id="object-for-outputs"),
        pytest.param({"inputs": [GOOD], "outputs": ["y"]}, b"", id="string-for-output"),
        pytest.param({"inputs": [GOOD], "outputs": [{}]}, b"", id="output-without-name"),
        pytest.param(
            {"inputs": [GOOD], "outputs": [{"name": "y"}] * 2}, b"", id="same-output-twice"
        ),
        pytest.param({"inputs": [GOOD]}, b"1", id="bytes-nobody-claims"),
        pytest.param({"inputs": [RAW | {"data": [1]}]}, b"1234", id="data-twice"),
        pytest.param({"inputs": [RAW]}, b"123", id="fewer-bytes-than-claimed"),
        pytest.param({"inputs": [RAW]}, b"12345", id="more-bytes-than-claimed"),
        pytest.param(
            {"inputs": [RAW | {"parameters": {"binary_data_size": -4}}]}, b"1234", id="negative"
        ),
        pytest.param(
            {"inputs": [RAW | {"parameters": {"binary_data_size": 4.0}}]}, b"1234", id="float-size"
        ),
        pytest.param(
            {"inputs": [RAW | {"parameters": {"binary_data_size": True}}]}, b"1", id="true-size"
        ),
    ],
)
def test_requests_that_are_refused(content, tail):
    """What is not a request of the protocol is one clear error."""
    text = orjson.dumps(content)
    with pytest.raises(BadRequestError):
        decode_request(Message(body=text + tail, json_size=len(text)))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000, b'{"inputs": [NaN]}', b"null"])
def test_bodies_that_are_not_json_are_refused(body):
    """A body that is no JSON object is refused before anything else is looked at."""
    with pytest.raises(BadRequestError, match="JSON"):
        decode_request(Message(body=body))


def test_a_json_part_longer_than_the_body_is_refused():
    """The header cannot claim more JSON than there are bytes."""
    with pytest.raises(BadRequestError, match="says 3"):
        decode_request(Message(body=b"{}", json_size=3))


def test_null_stands_for_an_absent_optional_field():
    """Clients that write every field send null for what they leave out."""
    body = orjson.dumps({"inputs": [GOOD], "id": None, "parameters": None, "outputs": None})
    request = decode_request(Message(body=body))
    assert (request.id, request.outputs, request.binary_outputs) == (None, (), False)
