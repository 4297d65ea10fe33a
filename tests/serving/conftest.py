"""ONNX models small enough to build in a test, and the application that serves them."""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.engine import ModelRef
from minga.inference.errors import ClientError
from minga.inference.grpc_client import GrpcClient
from minga.inference.grpc_server import GrpcServer
from minga.inference.limits import Limits
from minga.inference.repository import ModelRepository
from minga.inference.server import Server
from tests.serving.certificates import Files, issue

Shape = list[int | str]


def build_model(nodes, inputs, outputs, initializers=()) -> bytes:
    """Serialise a checked graph."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def scaling_model(factor: float, columns: int = 3) -> bytes:
    """A model whose answer tells which version gave it: output = input * factor."""
    return build_model(
        [helper.make_node("Mul", ["input", "factor"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )


def identity_model(element: int, shape: Shape | None = None) -> bytes:
    """A model that gives back what it takes, of any element type."""
    shape = ["batch", 2] if shape is None else shape
    return build_model(
        [helper.make_node("Identity", ["input"], ["output"])],
        [helper.make_tensor_value_info("input", element, shape)],
        [helper.make_tensor_value_info("output", element, shape)],
    )


def sum_model() -> bytes:
    """A model with two inputs and two outputs: their sum and their difference."""
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2])
        for name in ("left", "right", "sum", "difference")
    ]
    return build_model(
        [
            helper.make_node("Add", ["left", "right"], ["sum"]),
            helper.make_node("Sub", ["left", "right"], ["difference"]),
        ],
        infos[:2],
        infos[2:],
    )


def dividing_model() -> bytes:
    """A model whose integer division makes infinity and NaN of zeros: output = 1 / input."""
    return build_model(
        [helper.make_node("Reciprocal", ["input"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch"])],
    )


def gathering_model() -> bytes:
    """A model that computes for some values only: output = table[input], with three rows."""
    return build_model(
        [helper.make_node("Gather", ["table", "input"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.array([1, 2, 3], np.float32), "table")],
    )


def failing_model() -> bytes:
    """A model that loads and can never compute: it looks outside its table."""
    return build_model(
        [helper.make_node("Gather", ["input", "nine"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.array([9], np.int64), "nine")],
    )


def sequence_model() -> bytes:
    """A model whose output is no tensor."""
    return build_model(
        [helper.make_node("SequenceConstruct", ["input"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1])],
        [helper.make_tensor_sequence_value_info("output", TensorProto.FLOAT, None)],
    )


def image_model() -> bytes:
    """A convolution over images of any size from 3 by 3 on, with channels that it counts on."""
    return build_model(
        [helper.make_node("Conv", ["input", "kernel"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1, "h2", "w2"])],
        [numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "kernel")],
    )


def deep_model(width: int = 512, layers: int = 24) -> bytes:
    """A model that computes for milliseconds: output = tanh(... tanh(input @ w) ... @ w)."""
    names = ["input", *(f"hidden{layer}" for layer in range(layers - 1)), "output"]
    nodes = [
        node
        for layer in range(layers)
        for node in (
            helper.make_node("MatMul", [names[layer], "w"], [f"product{layer}"]),
            helper.make_node("Tanh", [f"product{layer}"], [names[layer + 1]]),
        )
    ]
    return build_model(
        nodes,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")],
    )


def ref_of(folder: Path, content: bytes, name: str, version: str = "1") -> ModelRef:
    """Write a model file into a folder and refer to it."""
    path = folder / f"{name}-{version}.onnx"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return ModelRef(name=name, version=version, path=str(path), sha256=digest)


@pytest.fixture
def models():
    """The builders of this module by kind, for tests that need bytes."""
    return {
        "scaling": scaling_model,
        "identity": identity_model,
        "sum": sum_model,
        "dividing": dividing_model,
        "gathering": gathering_model,
        "failing": failing_model,
        "sequence": sequence_model,
        "image": image_model,
        "deep": deep_model,
    }


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., ModelRef]:
    """Write a model file and refer to it."""

    def write(content: bytes, name: str = "scaling", version: str = "1") -> ModelRef:
        return ref_of(tmp_path, content, name, version)

    return write


@pytest.fixture
def make_app(write_model) -> Callable[..., InferenceApp]:
    """Serve models by name as version 1."""

    def make(limits: Limits | None = None, **contents: bytes) -> InferenceApp:
        repository = ModelRepository()
        repository.apply([write_model(content, name) for name, content in contents.items()])
        return InferenceApp(repository, limits=limits)

    return make


@contextlib.contextmanager
def running(*servers: Server | GrpcServer) -> Iterator[None]:
    """Run real servers in one loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield
    finally:
        for server in reversed(servers):
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def serving(app: InferenceApp, *, grpc: bool = False) -> Iterator[str]:
    """Run a real server on a free loopback port, and give its URL."""
    server = GrpcServer(app.service, port=0) if grpc else Server(app, port=0)
    with running(server):
        yield server.url


@pytest.fixture
def serve():
    """A context manager that runs an application on a free port and gives its URL."""
    return serving


@dataclass
class Load:
    """Closed-loop callers of a model that scales; they stop at the end of the context.

    They try nothing twice unless they are told to, so what fails on its way is seen.

    Attributes:
        factors: which factor each answer had been multiplied by, in the order of arrival.
        failures: what went wrong, which is to be nothing.
    """

    url: str
    model: str = "scaling"
    num_callers: int = 4
    credentials: Credentials | None = None
    retries: int = 0
    factors: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._call) for _ in range(self.num_callers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, factor: float, timeout_s: float = 30) -> None:
        """Wait until an answer of this factor has arrived."""
        deadline = time.monotonic() + timeout_s
        while factor not in self.factors:
            assert time.monotonic() < deadline, f"no answer with {factor}: {self.failures[:3]}"
            self._stop.wait(0.01)

    def _call(self) -> None:
        rows = np.ones((1, 3), np.float32)
        kind = GrpcClient if self.url.startswith("grpc") else InferenceClient
        with kind(self.url, credentials=self.credentials, retries=self.retries) as client:
            while not self._stop.is_set():
                try:
                    output = client.infer(self.model, {"input": rows})["output"]
                except ClientError as error:
                    self.failures.append(str(error))
                else:
                    self.factors.append(float(output[0, 0]))


@pytest.fixture(scope="session")
def pem(tmp_path_factory) -> Files:
    """Certificates of one authority, for a server on this machine and for a client."""
    folder = tmp_path_factory.mktemp("pem")
    ca, _, issuer = issue(folder, "ca")
    server, server_key, _ = issue(folder, "server", issuer)
    client, client_key, _ = issue(folder, "client", issuer)
    return Files(ca=ca, server=server, server_key=server_key, client=client, client_key=client_key)


@pytest.fixture(scope="session")
def third_party() -> Path:
    """The folder of the programs of third parties; see `third_parties`."""
    from tests.serving.third_parties import programs

    return programs()


@pytest.fixture
def load() -> type[Load]:
    """Constant load on a server, with failures counted on the callers' side."""
    return Load


@pytest.fixture
def register(registry_uri, tmp_path, models):
    """Register a version of a model that scales, as a training run does."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=registry_uri, registry_uri=registry_uri)

    def make(name: str, factor: float, *, alias: str | None = "champion", **changes) -> str:
        content = changes.get("content") or models["scaling"](factor)
        bundle = tmp_path / f"{name}-{factor}"
        bundle.mkdir()
        (bundle / "model.onnx").write_bytes(content)
        if "profile" in changes:
            (bundle / "profile.json").write_text(changes["profile"])
        experiment = client.get_experiment_by_name(name)
        location = (tmp_path / "artifacts").as_uri()
        experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(name, artifact_location=location)
        )
        run = client.create_run(experiment_id)
        client.log_artifacts(run.info.run_id, str(bundle), "bundle")
        if not experiment:
            client.create_registered_model(name)
        tags = {"minga.onnx_sha256": hashlib.sha256(content).hexdigest()}
        source = changes.get("source", run.info.artifact_uri + "/bundle")
        version = client.create_model_version(
            name,
            source.format(run_id=run.info.run_id),
            run.info.run_id,
            tags=changes.get("tags", tags),
        ).version
        if alias:
            client.set_registered_model_alias(name, alias, version)
        return str(version)

    return make
