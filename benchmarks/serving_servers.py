"""The servers of `serving.py`: how each is installed, started, asked once, and ended."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import grpc
import numpy as np
import orjson
import psutil
from harness import HERE, STOP_TIMEOUT_S, RivalError, rival_python
from rivals.serve_work import NAME
from serving_load import METHOD, Request, floats

from minga.inference.grpc_wire import write_request
from minga.inference.protocol import JSON_SIZE_HEADER, InferRequest, encode_request
from minga.inference.v2 import open_inference_pb2 as pb

START_TIMEOUT_S: Final = 180.0
V2: Final = f"/v2/models/{NAME}/infer"
JSON_HEADERS: Final = (("content-type", "application/json"),)
WIRES: Final = ("json", "binary", "grpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A model that is served."""

    name: str
    widths: tuple[int, ...]
    max_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server, and how it is started and asked.

    Attributes:
        name: as in the tables.
        command: module and arguments, from this folder.
        package: the rival's requirement; empty means that it runs in our environment.
        beside: what else its environment needs.
        wires: what it is asked over.
        path: where it answers JSON, in a form of its own unless it speaks the protocol.
        field: the name of the rows in that form.
    """

    name: str
    command: tuple[str, ...]
    package: str = ""
    beside: tuple[str, ...] = ()
    wires: tuple[str, ...] = ("json",)
    path: str = V2
    field: str = ""


OWN: Final = (
    Server(name="minga", command=("serving_ours", "local"), wires=WIRES),
    Server(name="minga on Ray", command=("serving_ours", "ray"), wires=WIRES),
    Server(name="bare starlette", command=("bare_serving", "http"), wires=("json", "binary")),
    Server(name="bare grpc.aio", command=("bare_serving", "grpc"), wires=("grpc",)),
)
RIVALS: Final = (
    Server(
        name="MLServer",
        command=("rivals.serve_mlserver",),
        package="mlserver==1.7.1",
        beside=("onnxruntime",),
        wires=("json", "grpc"),  # it has no binary tensors over HTTP
    ),
    Server(
        name="KServe",
        command=("rivals.serve_kserve",),
        package="kserve==0.21.0",
        beside=("onnxruntime",),
        wires=WIRES,
    ),
    Server(
        name="LitServe",
        command=("rivals.serve_litserve",),
        package="litserve==0.2.19",
        beside=("onnxruntime", "numpy"),
        path="/predict",
        field="rows",
    ),
    Server(
        name="BentoML",
        command=("rivals.serve_bentoml",),
        package="bentoml==1.4.39",
        beside=("onnxruntime", "numpy"),
        path="/predict",
        field="rows",
    ),
    Server(
        name="mlflow",
        command=("rivals.serve_mlflow",),
        package="mlflow==3.17.2",
        beside=("onnxruntime", "onnx"),
        path="/invocations",
        field="inputs",
    ),
    # In our environment, which has that Ray.
    Server(name="Ray Serve", command=("rivals.serve_ray",), path="/predict", field="rows"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A server that runs."""

    process: psutil.Process
    http_port: int
    grpc_port: int
    log: IO[str]

    def port(self, wire: str) -> int:
        """Give the port of a wire."""
        return self.grpc_port if wire == "grpc" else self.http_port


def request_of(server: Server, wire: str, row: np.ndarray) -> Request:
    """Write the request for one row as a server takes it."""
    request = InferRequest(inputs={"input": row}, binary_outputs=wire == "binary")
    if wire == "grpc":
        return Request(path=METHOD, body=write_request(NAME, None, request).SerializeToString())
    if server.field:
        body = orjson.dumps({server.field: row.tolist()})
        return Request(path=server.path, body=body, headers=JSON_HEADERS)
    message = encode_request(request, binary=wire == "binary")
    headers = JSON_HEADERS
    if message.json_size is not None:
        headers = ((JSON_SIZE_HEADER, str(message.json_size)),)
    return Request(path=server.path, body=message.body, headers=headers)


def answer_of(port: int, wire: str, request: Request) -> list[float]:
    """Ask once, and give the numbers of the answer."""
    if wire == "grpc":
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(
                METHOD, response_deserializer=pb.ModelInferResponse.FromString
            )
            response = call(request.body, timeout=5)
        if response.raw_output_contents:
            return [
                float(number) for number in np.frombuffer(response.raw_output_contents[0], "<f4")
            ]
        return list(response.outputs[0].contents.fp32_contents)
    url = f"http://127.0.0.1:{port}{request.path}"
    asked = urllib.request.Request(url, request.body, dict(request.headers))
    with urllib.request.urlopen(asked, timeout=5) as response:
        body, size = response.read(), response.headers.get(JSON_SIZE_HEADER)
    if size is not None:
        return [float(number) for number in np.frombuffer(body[int(size) :], "<f4")]
    return floats(body)


@contextmanager
def running(server: Server, python: Path, served: Network, file: Path) -> Iterator[Place]:
    """Run a server alone."""
    ports = free_ports(2)
    environment = os.environ | {
        "MINGA_BENCH_MODEL": str(file),
        "MINGA_BENCH_HTTP_PORT": str(ports[0]),
        "MINGA_BENCH_GRPC_PORT": str(ports[1]),
        "MINGA_BENCH_MAX_BATCH": str(served.max_batch),
        "MINGA_LOG_LEVEL": "WARNING",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    if server.package:
        environment.pop("PYTHONPATH", None)  # a rival must not find what is ours
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [python, "-m", *server.command],
            cwd=HERE,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield Place(
                process=psutil.Process(process.pid),
                http_port=ports[0],
                grpc_port=ports[1],
                log=log,
            )
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server with all that it started: the process first, so that it may clean up."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(4 * STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for one in started:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(started, timeout=STOP_TIMEOUT_S)


def free_ports(count: int) -> list[int]:
    """Find ports that nobody has now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for_answer(
    place: Place, server: Server, row: np.ndarray, expected: Sequence[float]
) -> None:
    """Wait until a server answers, and check the numbers over each of its wires."""
    deadline = time.monotonic() + START_TIMEOUT_S
    for wire in server.wires:
        request, port = request_of(server, wire, row), place.port(wire)
        while True:
            try:
                found = answer_of(port, wire, request)
                break
            except (OSError, grpc.RpcError) as error:
                if time.monotonic() > deadline or not _is_running(place):
                    place.log.seek(0)
                    said = place.log.read().strip().splitlines() or ["nothing"]
                    raise RivalError(f"{server.name} over {wire}: {error}; {said[-1]}") from error
                time.sleep(0.2)
        if not np.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise RivalError(f"{server.name} answers other numbers over {wire}")


def _is_running(place: Place) -> bool:
    return place.process.is_running() and place.process.status() != psutil.STATUS_ZOMBIE


def environments(servers: Sequence[Server]) -> dict[str, Path]:
    """Make the rivals' environments; one that cannot be made is left out, and said."""
    found: dict[str, Path] = {}
    for server in servers:
        try:
            found[server.name] = (
                rival_python(server.package, *server.beside)
                if server.package
                else Path(sys.executable)
            )
        except RivalError as error:
            print(f"{server.name} is left out: {error}", file=sys.stderr)
    return found
