"""gRPC: every method, every datatype, raw and typed, and a clear status for everything else."""

import asyncio
import contextlib
import subprocess
import sys

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from minga.inference.app import InferenceApp
from minga.inference.errors import (
    ClientError,
    PortInUseError,
    RejectedError,
    ServerUnreachableError,
)
from minga.inference.grpc_client import GrpcClient
from minga.inference.grpc_server import GrpcServer
from minga.inference.limits import Limits
from minga.inference.protocol import InferRequest, RequestedOutput
from minga.inference.repository import ModelRepository
from minga.inference.server import listen
from minga.inference.v2 import open_inference_pb2 as pb
from tests.federation.proxy import open_proxy

ROWS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
SERVICE = "/inference.GRPCInferenceService/"
ELEMENTS = {
    "BOOL": (TensorProto.BOOL, "bool_contents", [[True, False], [False, True]]),
    "UINT8": (TensorProto.UINT8, "uint_contents", [[0, 255], [1, 2]]),
    "UINT16": (TensorProto.UINT16, "uint_contents", [[0, 65535], [1, 2]]),
    "UINT32": (TensorProto.UINT32, "uint_contents", [[0, 2**32 - 1], [1, 2]]),
    "UINT64": (TensorProto.UINT64, "uint64_contents", [[0, 2**64 - 1], [1, 2]]),
    "INT8": (TensorProto.INT8, "int_contents", [[-128, 127], [1, 2]]),
    "INT16": (TensorProto.INT16, "int_contents", [[-32768, 32767], [1, 2]]),
    "INT32": (TensorProto.INT32, "int_contents", [[-(2**31), 2**31 - 1], [1, 2]]),
    "INT64": (TensorProto.INT64, "int64_contents", [[-(2**63), 2**63 - 1], [1, 2]]),
    "FP32": (TensorProto.FLOAT, "fp32_contents", [[1.5, -0.25], [np.inf, 0.0]]),
    "FP64": (TensorProto.DOUBLE, "fp64_contents", [[1e300, -1e-300], [0.1, 0.0]]),
    "BYTES": (TensorProto.STRING, "bytes_contents", [["", "é🦙"], ["a", "b" * 300]]),
}


@contextlib.asynccontextmanager
async def channel_to(app: InferenceApp):
    """Serve an application over gRPC on a free port, and connect."""
    async with (
        GrpcServer(app.service, port=0) as server,
        grpc.aio.insecure_channel(server.url.removeprefix("grpc://")) as channel,
    ):
        yield channel
    app.service.close()


async def call(channel, name, request, answer=None, **options):
    """Call a method; messages are those of the protocol, or bytes."""
    if isinstance(request, bytes):
        method = channel.unary_unary(SERVICE + name)
    else:
        method = channel.unary_unary(
            SERVICE + name,
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
    return await method(request, timeout=10, **options)


async def refusal(channel, name, request, answer=None, **options) -> grpc.aio.AioRpcError:
    """Call a method that refuses, and give the error."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(channel, name, request, answer, **options)
    return error.value


def infer_request(array=ROWS, *, datatype="FP32", model="scaling", **fields):
    """A request with one raw tensor."""
    tensor = {"name": "input", "datatype": datatype, "shape": array.shape}
    return pb.ModelInferRequest(
        **{
            "model_name": model,
            "inputs": [tensor],
            "raw_input_contents": [array.tobytes()],
        }
        | fields
    )


def output_of(response) -> np.ndarray:
    """Read the one raw output of a response."""
    assert not response.outputs[0].HasField("contents")
    array = np.frombuffer(response.raw_output_contents[0], np.float32)
    return array.reshape(list(response.outputs[0].shape))


@pytest.mark.parametrize("compression", list(grpc.Compression), ids=lambda one: one.name)
@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize("form", ["raw", "typed"])
async def test_infer_in_every_combination(*, form, version, compression, make_app, models):
    """Raw and typed tensors, with and without version, compressed or not: raw out, with id."""
    request = infer_request(id="42", model_version=version)
    if form == "typed":
        del request.raw_input_contents[:]
        request.inputs[0].contents.fp32_contents.extend(ROWS.ravel().tolist())
    async with channel_to(make_app(scaling=models["scaling"](2))) as channel:
        response = await call(
            channel, "ModelInfer", request, pb.ModelInferResponse, compression=compression
        )
    np.testing.assert_array_equal(output_of(response), ROWS * 2)
    assert (response.model_name, response.model_version, response.id) == ("scaling", "1", "42")
    assert (response.outputs[0].name, response.outputs[0].datatype) == ("output", "FP32")


@pytest.mark.parametrize("datatype", ELEMENTS)
async def test_every_datatype_with_its_limits(datatype, make_app, models):
    """The smallest and largest values of each datatype come back as they went, raw and typed."""
    element, field, values = ELEMENTS[datatype]
    flat = [value for row in values for value in row]
    typed = [value.encode() for value in flat] if datatype == "BYTES" else flat
    tensor = {"name": "input", "datatype": datatype, "shape": [2, 2]}
    request = pb.ModelInferRequest(
        model_name="identity", inputs=[tensor | {"contents": {field: typed}}]
    )
    app = make_app(identity=models["identity"](element))
    async with channel_to(app) as channel:
        first = await call(channel, "ModelInfer", request, pb.ModelInferResponse)
        again = pb.ModelInferRequest(
            model_name="identity", inputs=[tensor], raw_input_contents=first.raw_output_contents
        )
        second = await call(channel, "ModelInfer", again, pb.ModelInferResponse)
    assert first.raw_output_contents == second.raw_output_contents
    assert second.outputs[0].datatype == datatype
    if datatype == "BYTES":
        wire = b"".join(len(value).to_bytes(4, "little") + value for value in typed)
        assert second.raw_output_contents[0] == wire
    else:
        dtype = np.dtype(datatype.lower().replace("fp", "float").replace("bool", "?"))
        assert np.frombuffer(second.raw_output_contents[0], dtype).tolist() == flat


async def test_half_precision_is_raw_only(make_app, models):
    """FP16 has no typed form; raw it goes through."""
    app = make_app(half=models["identity"](TensorProto.FLOAT16, ["n"]))
    half = np.array([1.5, -2], np.float16)
    request = infer_request(half, datatype="FP16", model="half")
    async with channel_to(app) as channel:
        response = await call(channel, "ModelInfer", request, pb.ModelInferResponse)
        del request.raw_input_contents[:]
        error = await refusal(channel, "ModelInfer", request, pb.ModelInferResponse)
    assert response.raw_output_contents[0] == half.tobytes()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "send it raw" in error.details()


async def test_what_is_served_is_described(make_app, models):
    """Live, ready, metadata of server and model, and an unknown model that is not ready."""
    async with channel_to(make_app(scaling=models["scaling"](1))) as channel:
        live = await call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
        ready = await call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
        server = await call(
            channel, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse
        )
        model = await call(
            channel,
            "ModelMetadata",
            pb.ModelMetadataRequest(name="scaling"),
            pb.ModelMetadataResponse,
        )
        states = [
            (await call(channel, "ModelReady", request, pb.ModelReadyResponse)).ready
            for request in (
                pb.ModelReadyRequest(name="scaling", version="1"),
                pb.ModelReadyRequest(name="scaling", version="2"),
                pb.ModelReadyRequest(name="other"),
            )
        ]
        missing = await refusal(
            channel, "ModelMetadata", pb.ModelMetadataRequest(name="x"), pb.ModelMetadataResponse
        )
    assert live.live
    assert ready.ready
    assert (server.name, list(server.extensions)) == (
        "minga",
        ["binary_tensor_data", "statistics", "model_repository"],
    )
    assert (model.name, list(model.versions), model.platform) == (
        "scaling",
        ["1"],
        "onnxruntime_onnx",
    )
    assert [
        (one.name, one.datatype, list(one.shape)) for one in (*model.inputs, *model.outputs)
    ] == [
        ("input", "FP32", [-1, 3]),
        ("output", "FP32", [-1, 3]),
    ]
    assert states == [True, False, False]
    assert missing.code() is grpc.StatusCode.NOT_FOUND


async def test_a_server_without_models_is_not_ready():
    """It lives, it is not ready, and inference is UNAVAILABLE, not unknown."""
    async with channel_to(InferenceApp(ModelRepository())) as channel:
        ready = await call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
        error = await refusal(channel, "ModelInfer", infer_request(), pb.ModelInferResponse)
    assert not ready.ready
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def changed(**fields):
    """A request of the right form but for some fields."""
    return infer_request(**fields)


def typed_request(datatype="FP32", **contents):
    """A request with one typed tensor."""
    tensor = {"name": "input", "datatype": datatype, "shape": [2, 3], "contents": contents}
    return pb.ModelInferRequest(model_name="scaling", inputs=[tensor])


TENSOR = {"name": "input", "datatype": "FP32", "shape": [2, 3]}
RAW = ROWS.tobytes()
HOSTILE = {
    "no-inputs": changed(inputs=[], raw_input_contents=[]),
    "no-contents": changed(raw_input_contents=[]),
    "too-few-raw": changed(inputs=[TENSOR, TENSOR | {"name": "b"}]),
    "too-many-raw": changed(raw_input_contents=[RAW, RAW]),
    "short-raw": changed(raw_input_contents=[RAW[:-1]]),
    "long-raw": changed(raw_input_contents=[RAW + b"!"]),
    "twice": changed(inputs=[TENSOR, TENSOR], raw_input_contents=[RAW, RAW]),
    "both": changed(inputs=[TENSOR | {"contents": {"fp32_contents": [1] * 6}}]),
    "wrong-name": changed(inputs=[TENSOR | {"name": "other"}]),
    "long-name": changed(inputs=[TENSOR | {"name": "x" * 100_000}]),
    "no-name": changed(inputs=[TENSOR | {"name": ""}]),
    "wrong-shape": changed(inputs=[TENSOR | {"shape": [3, 2]}]),
    "negative-shape": changed(inputs=[TENSOR | {"shape": [-1, 3]}]),
    "huge-shape": changed(inputs=[TENSOR | {"shape": [2**62, 3]}]),
    "deep-shape": changed(inputs=[TENSOR | {"shape": [1] * 40}]),
    "unknown-datatype": changed(inputs=[TENSOR | {"datatype": "FP33"}]),
    "wrong-datatype": changed(inputs=[TENSOR | {"datatype": "INT32"}]),
    "unknown-output": changed(outputs=[{"name": "no"}]),
    "same-output": changed(outputs=[{"name": "output"}, {"name": "output"}]),
    "typed-elsewhere": typed_request(fp64_contents=[1] * 6),
    "typed-short": typed_request(fp32_contents=[1]),
    "typed-range": typed_request("INT8", int_contents=[128] * 6),
    "typed-unsigned-range": typed_request("UINT16", uint_contents=[65536] * 6),
    "typed-not-utf8": typed_request("BYTES", bytes_contents=[b"\xff"] * 6),
    "not-a-message": b"\xff\xff\xff",
}


@pytest.mark.parametrize("attack", HOSTILE)
async def test_hostile_requests_are_invalid_arguments(attack, make_app, models):
    """Each is refused with a short reason, and the next request is answered."""
    async with channel_to(make_app(scaling=models["scaling"](1))) as channel:
        error = await refusal(channel, "ModelInfer", HOSTILE[attack], pb.ModelInferResponse)
        again = await call(channel, "ModelInfer", infer_request(), pb.ModelInferResponse)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert 0 < len(error.details()) < 1000
    assert "Traceback" not in error.details()
    np.testing.assert_array_equal(output_of(again), ROWS)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=100), cut=st.integers(0, 60), flip=st.integers(0, 60))
async def test_no_bytes_make_the_server_fail(*, noise, cut, flip, grpc_channel):
    """Random bytes and damaged requests are answered, or refused as the caller's fault."""
    whole = bytearray(infer_request().SerializeToString())
    whole[flip % len(whole)] ^= 0xFF
    channel = await grpc_channel()
    statuses = set()
    for data in (noise, bytes(whole), bytes(whole[:cut])):
        calling = channel.unary_unary(SERVICE + "ModelInfer")(data, timeout=10)
        statuses.add((await calling.code()).name)
    assert statuses <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}


@pytest.fixture
async def grpc_channel(make_app, models):
    """A channel to a server that scales, opened at the first use in the test's loop."""
    stack = contextlib.AsyncExitStack()
    opened = []

    async def connect():
        if not opened:
            app = make_app(scaling=models["scaling"](1))
            opened.append(await stack.enter_async_context(channel_to(app)))
        return opened[0]

    async with stack:
        yield connect


async def test_limits_hold_after_decompression_too(make_app, models):
    """A message over the limit is refused, whether it is long or a bomb; so are long headers."""
    app = make_app(Limits(max_body_bytes=100_000), scaling=models["scaling"](1))
    bomb = infer_request(raw_input_contents=[bytes(5_000_000)])
    async with channel_to(app) as channel:
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            error = await refusal(
                channel, "ModelInfer", bomb, pb.ModelInferResponse, compression=compression
            )
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        headers = (("x-padding", "x" * 100_000),)
        error = await refusal(
            channel, "ModelInfer", infer_request(), pb.ModelInferResponse, metadata=headers
        )
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        again = await call(channel, "ModelInfer", infer_request(), pb.ModelInferResponse)
    np.testing.assert_array_equal(output_of(again), ROWS)


async def test_unknown_methods_are_unimplemented(make_app, models):
    """What is not served, as Triton's shared memory, says so."""
    async with channel_to(make_app(scaling=models["scaling"](1))) as channel:
        error = await refusal(channel, "SystemSharedMemoryStatus", b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_statistics_count_requests_rows_and_runs(make_app, models):
    """Rows are inferences, runs are executions, failures are apart; unknown models are refused."""
    async with channel_to(make_app(scaling=models["scaling"](1))) as channel:
        for array in (ROWS, ROWS, ROWS[:1]):
            await call(channel, "ModelInfer", infer_request(array), pb.ModelInferResponse)
        await refusal(channel, "ModelInfer", HOSTILE["wrong-name"], pb.ModelInferResponse)
        answer = await call(
            channel,
            "ModelStatistics",
            pb.ModelStatisticsRequest(),
            pb.ModelStatisticsResponse,
        )
        missing = await refusal(
            channel,
            "ModelStatistics",
            pb.ModelStatisticsRequest(name="x"),
            pb.ModelStatisticsResponse,
        )
    [one] = answer.model_stats
    assert (one.name, one.version, one.inference_count, one.execution_count) == (
        "scaling",
        "1",
        5,
        3,
    )
    stats = one.inference_stats
    assert (stats.success.count, stats.fail.count, stats.compute_infer.count) == (3, 1, 3)
    assert stats.success.ns >= stats.compute_infer.ns > 0
    assert [(batch.batch_size, batch.compute_infer.count) for batch in one.batch_stats] == [
        (1, 1),
        (2, 2),
    ]
    assert one.last_inference > 1.6e12
    assert missing.code() is grpc.StatusCode.NOT_FOUND


async def test_models_are_loaded_and_unloaded(make_app, models):
    """Where callers may, an unloaded model answers no more until it is loaded again."""
    app = make_app(Limits(model_control=True), scaling=models["scaling"](2))
    index = (pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
    unload = pb.RepositoryModelUnloadRequest(model_name="scaling")
    load = pb.RepositoryModelLoadRequest(model_name="scaling")
    async with channel_to(app) as channel:
        await call(channel, "RepositoryModelUnload", unload, pb.RepositoryModelUnloadResponse)
        unloaded = await call(channel, "RepositoryIndex", *index)
        gone = await refusal(channel, "ModelInfer", infer_request(), pb.ModelInferResponse)
        await call(channel, "RepositoryModelLoad", load, pb.RepositoryModelLoadResponse)
        loaded = await call(channel, "RepositoryIndex", *index)
        answer = await call(channel, "ModelInfer", infer_request(), pb.ModelInferResponse)
        load.model_name = "x"
        unknown = await refusal(
            channel, "RepositoryModelLoad", load, pb.RepositoryModelLoadResponse
        )
    assert [(one.name, one.version, one.state) for one in unloaded.models] == [
        ("scaling", "1", "UNAVAILABLE")
    ]
    assert gone.code() is unknown.code() is grpc.StatusCode.NOT_FOUND
    assert loaded.models[0].state == "READY"
    np.testing.assert_array_equal(output_of(answer), ROWS * 2)


async def test_callers_may_not_unload_unless_told(make_app, models):
    """By default nobody can take a model away."""
    unload = pb.RepositoryModelUnloadRequest(model_name="scaling")
    async with channel_to(make_app(scaling=models["scaling"](1))) as channel:
        error = await refusal(
            channel, "RepositoryModelUnload", unload, pb.RepositoryModelUnloadResponse
        )
        await call(channel, "ModelInfer", infer_request(), pb.ModelInferResponse)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_taken_port_is_one_clear_error(make_app, models):
    """A gRPC server on a port that someone has is refused with a remedy."""
    app = make_app(scaling=models["scaling"](1))
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port}"):
            await GrpcServer(app.service, port=port).start()


def test_our_client_over_grpc(make_app, models, serve):
    """Arrays in and out, chosen outputs and versions, metadata, readiness, errors with a status."""
    app = make_app(sum=models["sum"](), scaling=models["scaling"](2))
    left, right = np.full((2, 2), 3, np.float32), np.ones((2, 2), np.float32)
    with serve(app, grpc=True) as url, GrpcClient(url) as client:
        outputs = client.infer("sum", {"left": left, "right": right}, outputs=["difference"])
        request = InferRequest(
            inputs={"input": ROWS}, outputs=(RequestedOutput(name="output"),), id="7"
        )
        response = client.request("scaling", request, version="1")
        assert client.models() == ("sum", "scaling")
        assert client.ready()
        assert client.ready("sum")
        assert not client.ready("other")
        metadata = client.metadata("scaling")
        with pytest.raises(RejectedError, match="no model 'other'") as refused:
            client.infer("other", {"input": ROWS})
    np.testing.assert_array_equal(outputs["difference"], left - right)
    assert list(outputs) == ["difference"]
    np.testing.assert_array_equal(response.outputs["output"], ROWS * 2)
    assert (response.model_version, response.id) == ("1", "7")
    assert metadata == {
        "name": "scaling",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}],
    }
    assert refused.value.status == 404


async def test_our_client_dials_again_in_time(make_app, models, serve):
    """Whom a dying server resets gets an answer from the next one, within the usual retries."""
    app = make_app(scaling=models["scaling"](2))
    with serve(app, grpc=True) as url:
        async with open_proxy(int(url.rpartition(":")[2])) as proxy:
            proxy.cut()
            with GrpcClient(f"grpc://{proxy.address}") as client:
                asked = asyncio.create_task(asyncio.to_thread(client.models))
                await asyncio.sleep(0.1)
                proxy.heal()
                assert await asked == ("scaling",)


def test_our_client_without_a_server():
    """Nobody at the URL is an error with a remedy; a URL of another kind is one too."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    with GrpcClient(f"grpc://127.0.0.1:{port}", timeout_s=5) as client:
        assert not client.ready()
        with pytest.raises(ServerUnreachableError, match="minga serve"):
            client.models()
    for url in ("http://127.0.0.1:8001", "grpc://127.0.0.1", "grpc://:x", "grpc://[::1"):
        with pytest.raises(ClientError, match=r"grpc://127\.0\.0\.1:8001"):
            GrpcClient(url)


def test_messages_share_a_process_with_others_of_their_names():
    """Another package's messages of the same names can be loaded too, before or after ours."""
    script = """
from pathlib import Path
from google.protobuf import descriptor_pb2, descriptor_pool
import minga.inference
folder = Path(minga.inference.__file__).parent / "v2" / "open_inference.binpb"
theirs = descriptor_pb2.FileDescriptorSet.FromString(folder.read_bytes()).file[0]
theirs.name = "grpc_service.proto"
theirs.message_type[0].field.add(name="extra", number=9, type=9, label=1)
descriptor_pool.Default().Add(theirs)
from minga.inference.v2 import open_inference_pb2 as ours
import pickle
message = ours.ModelInferRequest(model_name="a")
assert pickle.loads(pickle.dumps(message)) == message
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
