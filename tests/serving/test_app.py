"""The ASGI application: every answer of the protocol, and a clear 4xx for everything else."""

import gzip
import re
import struct
import zlib

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from minga.inference.app import InferenceApp
from minga.inference.limits import Limits
from minga.inference.protocol import JSON_SIZE_HEADER, Message, decode_response
from minga.inference.repository import ModelRepository

ROWS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
TENSOR = {"name": "input", "datatype": "FP32", "shape": [2, 3]}
INFER = "/v2/models/scaling/infer"


def connect(app) -> httpx.AsyncClient:
    """Talk to an application without a socket; its exceptions reach the test."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def json_body(data, **fields) -> bytes:
    """A request with its one tensor in JSON."""
    return orjson.dumps({"inputs": [TENSOR | {"data": data}]} | fields)


def binary_body(raw: bytes = ROWS.tobytes(), **fields) -> tuple[bytes, dict[str, str]]:
    """A request with its one tensor as raw bytes, and the header it needs."""
    tensor = TENSOR | {"parameters": {"binary_data_size": len(raw)}}
    text = orjson.dumps({"inputs": [tensor]} | fields)
    return text + raw, {JSON_SIZE_HEADER: str(len(text))}


def decoded(response: httpx.Response):
    """Read a success as a response of the protocol."""
    assert response.status_code == 200, response.text
    size = response.headers.get(JSON_SIZE_HEADER)
    return decode_response(
        Message(body=response.content, json_size=None if size is None else int(size))
    )


def assert_refused(response: httpx.Response, status: int) -> None:
    """Check an error's status and form."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert response.json()["error"]


INPUT_FORMS = {
    "json-nested": lambda fields: (json_body(ROWS.tolist(), **fields), {}),
    "json-flat": lambda fields: (json_body(ROWS.ravel().tolist(), **fields), {}),
    "binary": lambda fields: binary_body(**fields),
}
OUTPUT_FORMS = {
    "default": ({}, False),
    "named": ({"outputs": [{"name": "output"}]}, False),
    "json": ({"outputs": [{"name": "output", "parameters": {"binary_data": False}}]}, False),
    "binary": ({"outputs": [{"name": "output", "parameters": {"binary_data": True}}]}, True),
    "all-binary": ({"parameters": {"binary_data_output": True}}, True),
    "one-wins-over-all": (
        {
            "parameters": {"binary_data_output": True},
            "outputs": [{"name": "output", "parameters": {"binary_data": False}}],
        },
        False,
    ),
}


def bare_deflate(body: bytes) -> bytes:
    """Deflate without zlib's container, as some clients send it."""
    return zlib.compress(body, wbits=-zlib.MAX_WBITS)


CODINGS = {
    "plain": (None, lambda body: body),
    "identity": ("identity", lambda body: body),
    "gzip": ("gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "bare-deflate": ("deflate", bare_deflate),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("outputs", OUTPUT_FORMS)
@pytest.mark.parametrize("inputs", INPUT_FORMS)
@pytest.mark.parametrize("path", [INFER, "/v2/models/scaling/versions/1/infer"])
async def test_infer_in_every_combination(*, path, inputs, outputs, coding, make_app, models):
    """JSON and raw tensors in and out, plain and compressed, with and without version, with id."""
    app = make_app(scaling=models["scaling"](2))
    fields, is_binary = OUTPUT_FORMS[outputs]
    body, headers = INPUT_FORMS[inputs](fields | {"id": "42"})
    coding_header, compress = CODINGS[coding]
    if coding_header is not None:
        headers = headers | {"content-encoding": coding_header}
    async with connect(app) as client:
        response = await client.post(path, content=compress(body), headers=headers)
    answer = decoded(response)
    np.testing.assert_array_equal(answer.outputs["output"], ROWS * 2)
    assert (answer.model_name, answer.model_version, answer.id) == ("scaling", "1", "42")
    assert (JSON_SIZE_HEADER in response.headers) is is_binary


async def test_a_raw_request_is_answered_raw(make_app, models):
    """A body that is one tensor's bytes is understood by the model's input, and answered raw."""
    app = make_app(scaling=models["scaling"](2))
    async with connect(app) as client:
        response = await client.post(INFER, content=ROWS.tobytes(), headers={JSON_SIZE_HEADER: "0"})
    answer = decoded(response)
    np.testing.assert_array_equal(answer.outputs["output"], ROWS * 2)
    assert answer.id is None
    assert JSON_SIZE_HEADER in response.headers


async def test_no_content_type_is_needed(make_app, models):
    """Third-party clients send none; the body says what it is."""
    app = make_app(scaling=models["scaling"](2))
    async with connect(app) as client:
        response = await client.post(INFER, content=json_body(ROWS.tolist()))
    assert "content-type" not in response.request.headers
    assert decoded(response).outputs["output"].shape == (2, 3)


async def test_outputs_of_one_response_may_differ_in_form(make_app, models):
    """Raw and JSON outputs are mixed as asked for, and only those asked for come back."""
    app = make_app(sum=models["sum"]())
    pair = [
        {"name": name, "datatype": "FP32", "shape": [1, 2], "data": data}
        for name, data in (("left", [3, 4]), ("right", [1, 1]))
    ]
    wanted = [
        {"name": "difference", "parameters": {"binary_data": True}},
        {"name": "sum", "parameters": {"binary_data": False}},
    ]
    body = orjson.dumps({"inputs": pair, "outputs": wanted})
    async with connect(app) as client:
        response = await client.post("/v2/models/sum/infer", content=body)
    text = orjson.loads(response.content[: int(response.headers[JSON_SIZE_HEADER])])
    assert text["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert text["outputs"][1]["data"] == [4, 5]
    answer = decoded(response)
    assert answer.outputs["difference"].tolist() == [[2, 3]]


async def test_strings_go_through_in_both_forms(make_app, models):
    """A model of strings takes and gives them, as JSON text and length-prefixed."""
    app = make_app(words=models["identity"](TensorProto.STRING, ["n"]))
    words = ["minga", "", "ñandú"]
    tensor = {"name": "input", "datatype": "BYTES", "shape": [3]}
    raw = b"".join(struct.pack("<I", len(word.encode())) + word.encode() for word in words)
    text = orjson.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}],
            "parameters": {"binary_data_output": True},
        }
    )
    async with connect(app) as client:
        path = "/v2/models/words/infer"
        plain = await client.post(path, json={"inputs": [tensor | {"data": words}]})
        packed = await client.post(
            path, content=text + raw, headers={JSON_SIZE_HEADER: str(len(text))}
        )
    assert plain.json()["outputs"][0]["data"] == words
    assert packed.content.endswith(raw)
    assert decoded(packed).outputs["output"].tolist() == words


async def test_a_slow_model_answers_from_a_thread(make_app, models):
    """A model that computes for long gives the same answer as one that is run on the loop."""
    app = make_app(deep=models["deep"]())
    zeros = np.zeros((8, 512), np.float32)
    async with connect(app) as client:
        response = await client.post(
            "/v2/models/deep/infer", content=zeros.tobytes(), headers={JSON_SIZE_HEADER: "0"}
        )
    np.testing.assert_array_equal(decoded(response).outputs["output"], zeros)


EXTENSIONS = ["binary_tensor_data", "statistics", "model_repository"]
READS = {
    "/v2": {
        "name": "minga",
        "extensions": ["binary_tensor_data", "statistics", "model_repository"],
    },
    "/v2/": {
        "name": "minga",
        "extensions": ["binary_tensor_data", "statistics", "model_repository"],
    },
    "/v2/health/live": {"live": True},
    "/v2/health/ready": {"ready": True},
    "/v2/models": {"models": ["scaling"]},
    "/v2/models/scaling/ready": {"name": "scaling", "ready": True},
    "/v2/models/scaling/versions/1/ready": {"name": "scaling", "ready": True},
    "/v2/models/scaling": {"name": "scaling", "versions": ["1"], "platform": "onnxruntime_onnx"},
    "/v2/models/scaling/versions/1": {
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}],
    },
}


@pytest.mark.parametrize("path", READS)
async def test_reading(path, make_app, models):
    """Health, metadata and listings answer GET with the protocol's fields, and HEAD without."""
    async with connect(make_app(scaling=models["scaling"](1))) as client:
        response = await client.get(path)
        head = await client.head(path)
    assert response.status_code == 200
    assert READS[path].items() <= response.json().items()
    assert response.headers["content-type"] == "application/json"
    assert (head.status_code, head.content) == (200, b"")


async def test_an_empty_server_lives_but_is_not_ready():
    """Before the first model, the server is alive, not ready, and asks callers to come back."""
    async with connect(InferenceApp(ModelRepository())) as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        assert (await client.get("/v2/models")).json() == {"models": []}
        assert_refused(await client.get("/v2/health/ready"), 503)
        assert_refused(await client.get("/v2/models/scaling/ready"), 503)
        assert_refused(await client.post(INFER, content=json_body(ROWS.tolist())), 503)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/", 404),
        ("GET", "/v2/models/unknown", 404),
        ("GET", "/v2/models/unknown/ready", 404),
        ("GET", "/v2/models/scaling/versions/9", 404),
        ("GET", "/v2/models/scaling/versions/9/ready", 404),
        ("GET", "/v2/models/scaling/versions", 404),
        ("POST", "/v2/models/unknown/infer", 404),
        ("POST", "/v2/models/scaling/versions/9/infer", 404),
        ("POST", "/v2/models/sca%2Fling/infer", 404),
        ("POST", "/v2/models/%F0%9F%A6%99/infer", 404),
        ("GET", "/v2/models/scaling/infer", 405),
        ("PUT", "/v2/models/scaling/infer", 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v2/models/scaling", 405),
        ("POST", "/metrics", 405),
    ],
)
async def test_what_is_not_there(method, path, status, make_app, models):
    """Unknown paths, models and versions are 404, wrong methods 405 with what is allowed."""
    async with connect(make_app(scaling=models["scaling"](1))) as client:
        response = await client.request(method, path)
    assert_refused(response, status)
    assert ("allow" in response.headers) is (status == 405)


GOOD = json_body(ROWS.tolist())
HOSTILE = {
    "empty": (b"", {}, 400),
    "not-json": (b"rows please", {}, 400),
    "cut-json": (GOOD[:-5], {}, 400),
    "list": (b"[]", {}, 400),
    "deep": (b"[" * 5000, {}, 400),
    "nan": (json_body([]).replace(b"[]", b"[NaN,1,1,1,1,1]"), {}, 400),
    "infinity": (json_body([]).replace(b"[]", b"[1e999,1,1,1,1,1]"), {}, 400),
    "null-element": (json_body([None] * 6), {}, 400),
    "wrong-shape": (GOOD.replace(b"[2,3]", b"[3,2]"), {}, 400),
    "short-data": (json_body([1.0]), {}, 400),
    "wrong-datatype": (GOOD.replace(b"FP32", b"FP64"), {}, 400),
    "unknown-datatype": (GOOD.replace(b"FP32", b"FP33"), {}, 400),
    "negative-shape": (GOOD.replace(b"[2,3]", b"[-1,3]"), {}, 400),
    "huge-shape": (GOOD.replace(b"[2,3]", b"[99999999999999,3]"), {}, 400),
    "wrong-name": (GOOD.replace(b'"input"', b'"other"'), {}, 400),
    "wrong-output": (json_body(ROWS.tolist(), outputs=[{"name": "no"}]), {}, 400),
    "number-as-id": (json_body(ROWS.tolist(), id=7), {}, 400),
    "cut-binary": (binary_body()[0][:-1], binary_body()[1], 400),
    "long-binary": (binary_body()[0] + b"!", binary_body()[1], 400),
    "binary-without-header": (binary_body()[0], {}, 400),
    "header-without-binary": (GOOD, {JSON_SIZE_HEADER: "10"}, 400),
    "header-too-long": (GOOD, {JSON_SIZE_HEADER: "999999"}, 400),
    "header-negative": (GOOD, {JSON_SIZE_HEADER: "-1"}, 400),
    "header-words": (GOOD, {JSON_SIZE_HEADER: "many"}, 400),
    "header-enormous": (GOOD, {JSON_SIZE_HEADER: "9" * 5000}, 400),
    "raw-half-row": (bytes(13), {JSON_SIZE_HEADER: "0"}, 400),
    "bad-gzip": (b"no gzip", {"content-encoding": "gzip"}, 400),
    "cut-gzip": (gzip.compress(GOOD)[:-9], {"content-encoding": "gzip"}, 400),
    "empty-gzip": (b"", {"content-encoding": "gzip"}, 400),
    "gzip-and-more": (gzip.compress(GOOD) + b"!", {"content-encoding": "gzip"}, 400),
    "bad-deflate": (b"\xff\xff\xff", {"content-encoding": "deflate"}, 400),
    "brotli": (GOOD, {"content-encoding": "br"}, 415),
    "two-codings": (GOOD, {"content-encoding": "gzip, deflate"}, 415),
    "body-over-limit": (b" " * 10_001, {}, 413),
    "bomb": (gzip.compress(bytes(10_000_000)), {"content-encoding": "gzip"}, 413),
    "length-over-limit": (b"", {"content-length": "1" + "0" * 30}, 413),
    "length-enormous": (b"", {"content-length": "9" * 5000}, 413),
    "headers-over-limit": (GOOD, {"x-padding": "x" * 70_000}, 431),
}


@pytest.mark.parametrize("attack", HOSTILE)
async def test_hostile_input_is_a_clear_4xx(attack, make_app, models):
    """No body and no header makes the server fail; each is answered with what is wrong."""
    body, headers, status = HOSTILE[attack]
    app = make_app(Limits(max_body_bytes=10_000), scaling=models["scaling"](1))
    async with connect(app) as client:
        response = await client.post(INFER, content=body, headers=headers)
        again = await client.post(INFER, content=GOOD)
    assert_refused(response, status)
    assert len(response.content) < 1000
    assert again.status_code == 200


async def test_a_stream_over_the_limit_is_not_read_to_its_end(make_app, models):
    """A body without a length is given up when it passes the limit, not when it ends."""
    app = make_app(Limits(max_body_bytes=10_000), scaling=models["scaling"](1))
    taken = 0

    async def endless():
        nonlocal taken
        while True:
            taken += 1000
            yield bytes(1000)

    async with connect(app) as client:
        assert_refused(await client.post(INFER, content=endless()), 413)
    assert taken <= 12_000


async def test_a_caller_that_leaves_gets_no_answer(make_app, models):
    """If the connection breaks before the body is complete, nothing is sent into it."""
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": INFER, "headers": []}
    app = make_app(scaling=models["scaling"](1))
    await app(scope, receive, send)
    assert sent == []
    async with connect(app) as client:
        assert 'status="499"' in (await client.get("/metrics")).text


async def test_a_websocket_is_refused(make_app, models):
    """The protocol has no websockets; one is closed before it is accepted."""
    sent = []

    async def send(message):
        sent.append(message)

    app = make_app(scaling=models["scaling"](1))
    await app({"type": "websocket", "path": "/v2"}, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_an_output_that_json_cannot_carry_is_refused_with_the_remedy(make_app, models):
    """1/0 is infinity: refused in JSON, delivered raw."""
    app = make_app(dividing=models["dividing"]())
    request = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1], "data": [0]}]}
    async with connect(app) as client:
        path = "/v2/models/dividing/infer"
        refused = await client.post(path, json=request)
        raw = await client.post(path, json=request | {"parameters": {"binary_data_output": True}})
    assert_refused(refused, 400)
    assert "binary output" in refused.json()["error"]
    assert decoded(raw).outputs["output"].tolist() == [np.inf]


async def test_half_precision_has_no_json_form(make_app, models):
    """FP16 goes raw in both directions, and is refused in JSON in both."""
    app = make_app(half=models["identity"](TensorProto.FLOAT16, ["n"]))
    tensor = {"name": "input", "datatype": "FP16", "shape": [1]}
    raw = np.array([1.5], np.float16).tobytes()
    path = "/v2/models/half/infer"
    text = orjson.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": 2}}]})
    async with connect(app) as client:
        in_json = await client.post(path, json={"inputs": [tensor | {"data": [1.5]}]})
        out_json = await client.post(
            path, content=text + raw, headers={JSON_SIZE_HEADER: str(len(text))}
        )
        neither = await client.post(path, content=raw, headers={JSON_SIZE_HEADER: "0"})
    assert_refused(in_json, 400)
    assert_refused(out_json, 400)
    assert decoded(neither).outputs["output"].tolist() == [1.5]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NEARLY_TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("input") | JSON_VALUES,
        "datatype": st.sampled_from(["FP32", "BYTES", "BOOL", "INT64"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON_VALUES,
        "data": st.lists(st.floats(width=32), max_size=9) | JSON_VALUES,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": JSON_VALUES}),
    },
)
NEARLY_REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(NEARLY_TENSORS, max_size=2) | JSON_VALUES},
    optional={"outputs": JSON_VALUES, "parameters": JSON_VALUES, "id": JSON_VALUES},
)


def dumped(value) -> bytes:
    """Write JSON as liberally as Python does, NaN and lone surrogates included."""
    import json

    return json.dumps(value).encode()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    body=st.binary(max_size=200) | NEARLY_REQUESTS.map(dumped),
    tail=st.binary(max_size=30),
    json_size=st.none() | st.integers(-1, 300),
    coding=st.sampled_from(["", "gzip", "deflate"]),
)
async def test_no_body_makes_the_server_fail(*, body, tail, json_size, coding, make_app, models):
    """Whatever is sent, the answer is 200 or a 4xx with an error; never a 500."""
    app = make_app(scaling=models["scaling"](1))
    headers = {"content-encoding": coding} if coding else {}
    if json_size is not None:
        headers[JSON_SIZE_HEADER] = str(json_size)
    async with connect(app) as client:
        response = await client.post(INFER, content=body + tail, headers=headers)
    assert response.status_code == 200 or 400 <= response.status_code < 500


async def test_metrics_count_requests_by_model_version_and_status(make_app, models):
    """Prometheus sees served models by name and version; unknown ones never become a label."""
    async with connect(make_app(scaling=models["scaling"](1))) as client:
        await client.post(INFER, content=GOOD)
        await client.post(INFER, content=b"")
        await client.post("/v2/models/scan-me/infer", content=GOOD)
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    series = dict(re.findall(r"^(minga_inference_\S+) (\S+)$", response.text, re.MULTILINE))
    count = 'minga_inference_requests_total{{model="{}",status="{}",version="{}"}}'
    assert series[count.format("scaling", 200, 1)] == "1.0"
    assert series[count.format("scaling", 400, 1)] == "1.0"
    assert series[count.format("", 404, "")] == "1.0"
    assert series['minga_inference_request_seconds_count{model="scaling"}'] == "2.0"
    assert series["minga_inference_requests_in_progress"] == "0.0"
    assert 'minga_inference_model_info{model="scaling"' in response.text
    assert "scan-me" not in response.text
