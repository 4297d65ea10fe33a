"""Callers who mean harm, against a server in a process of its own whose memory is measured."""

import asyncio
import contextlib
import gzip
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest

from minga.inference.client import InferenceClient
from minga.inference.errors import InferenceError
from minga.inference.grpc_client import GrpcClient
from minga.inference.protocol import JSON_SIZE_HEADER
from tests.serving.conftest import identity_model, scaling_model
from tests.serving.test_app import GOOD, HOSTILE

pytestmark = pytest.mark.slow

MB = 1024 * 1024
INFER = "/v2/models/scaling/infer"
SCRIPT = """
import asyncio, hashlib, sys
from pathlib import Path
from minga.inference import connections, server
from minga.inference.app import InferenceApp
from minga.inference.engine import ModelRef
from minga.inference.grpc_server import GrpcServer
from minga.inference.limits import Limits
from minga.inference.repository import ModelRepository

connections._HEADERS_S = 2
connections._UNREAD_S = 2
server._IDLE_CONNECTION_S = 2

async def main(*files):
    repository = ModelRepository()
    repository.apply(
        ModelRef(
            name=Path(file).stem,
            version="1",
            path=file,
            sha256=hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        )
        for file in files
    )
    limits = Limits(
        max_body_bytes=8 * 2**20, max_pending_bytes=32 * 2**20, body_timeout_s=2, num_threads=2
    )
    app = InferenceApp(repository, limits=limits)
    async with server.Server(app, port=0) as http, GrpcServer(app.service, port=0) as rpc:
        print(http.url, rpc.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


class Target:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.url, self.grpc_url = process.stdout.readline().split()
        self._process = psutil.Process(process.pid)
        parts = urlsplit(self.url)
        self.address = parts.hostname, parts.port

    @property
    def memory(self) -> int:
        """What the process holds, in bytes."""
        return self._process.memory_info().rss

    @property
    def connections(self) -> int:
        """How many connections the process has."""
        return sum(one.status == "ESTABLISHED" for one in self._process.net_connections("tcp"))

    def assert_well(self) -> None:
        """Check that a usual caller is answered on both wires."""
        rows = np.ones((2, 3), np.float32)
        for client in (InferenceClient(self.url), GrpcClient(self.grpc_url)):
            with client:
                np.testing.assert_array_equal(
                    client.infer("scaling", {"input": rows})["output"], rows * 2
                )

    def wait(self, is_so, timeout_s: float = 60) -> None:
        """Wait for something that the server does in its time."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A server with small limits, warmed up by what the tests send."""
    with started(tmp_path_factory.mktemp("models")) as target:
        yield target


def pace(target: Target, num_callers: int, seconds: float = 1.0) -> tuple[float, float]:
    """Let callers on connections of their own ask the small model without a pause.

    Returns:
        answers a second, and the time that one answer in a hundred takes longer than, in seconds.
    """
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(GOOD)}\r\n\r\n".encode()
    times: list[float] = []

    async def call(end: float) -> None:
        reader, writer = await asyncio.open_connection(*target.address)
        while (begun := time.perf_counter()) < end:
            writer.write(head + GOOD)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            length = re.search(rb"content-length: (\d+)", answer)
            await reader.readexactly(int(length[1]))
            times.append(time.perf_counter() - begun)
        writer.close()

    async def crowd() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(call(end) for _ in range(num_callers)))

    asyncio.run(crowd())
    return len(times) / seconds, float(np.quantile(times, 0.99))


def test_a_crowd_on_a_small_model_is_served(target):
    """Four times the callers that fill the server get as much in all, each in its turn.

    A small model is computed as its requests are read, at most one of each connection, so the
    crowd waits no longer than its size says (Little's law), and nobody is refused.
    """
    turns = []
    for _ in range(4):
        most, _ = pace(target, 16)
        crowded, slow_s = pace(target, 64)
        if crowded > 0.7 * most and slow_s < 4 * 64 / crowded:
            return
        turns.append((most, crowded, slow_s))
    pytest.fail(f"the crowd is not served in any turn: {turns}")


@contextlib.contextmanager
def started(folder: Path, *before: str):
    """Start a server, as the last words of another command if there is one."""
    (folder / "scaling.onnx").write_bytes(scaling_model(2))
    (folder / "wide.onnx").write_bytes(identity_model(1, ["n"]))
    files = sorted(map(str, folder.iterdir()))
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT, *files], stdout=subprocess.PIPE, text=True
    )
    try:
        target = Target(process)
        target.assert_well()
        yield target
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_engine_is_small(tmp_path):
    """Serving small models over both wires takes a process of about 100 MB, under 200 anywhere."""
    with started(tmp_path) as target:
        assert target.memory < 200 * MB


def storm(target: Target, num_rounds: int) -> None:
    """Send every hostile request of the tables, many times, from several callers."""

    def attack(_: int) -> set[int]:
        statuses = set()
        with httpx.Client(base_url=target.url) as client:
            for body, headers, _ in HOSTILE.values():
                if "content-length" not in headers:
                    with contextlib.suppress(httpx.TransportError):
                        response = client.post(INFER, content=body, headers=headers)
                        statuses.add(response.status_code)
        return statuses

    with ThreadPoolExecutor(4) as callers:
        statuses = set().union(*callers.map(attack, range(num_rounds)))
    assert statuses <= {200, 400, 413, 415, 431}


def test_thousands_of_bad_requests_cost_no_memory(target):
    """After a warm-up, thousands of hostile requests leave the process as large as it was."""
    storm(target, 10)
    before = target.memory
    storm(target, 60)
    target.assert_well()
    assert target.memory - before < 8 * MB


def test_bombs_cost_no_memory(target):
    """Bodies that inflate to gigabytes are refused within the limit of one body."""
    bomb = gzip.compress(gzip.compress(bytes(64 * MB)) * 1000)
    headers = {"content-encoding": "gzip"}
    with httpx.Client(base_url=target.url) as client:
        client.post(INFER, content=gzip.compress(bytes(7 * MB)), headers=headers)
        before = target.memory
        for body in (bomb, gzip.compress(bytes(256 * MB))):
            for _ in range(5):
                response = client.post(INFER, content=body, headers=headers)
                assert response.status_code in (400, 413)
    assert target.memory - before < 24 * MB
    target.assert_well()


def test_millions_of_empty_lists_cost_no_memory(target):
    """Small on the wire and large in memory: such JSON is refused before it is read."""
    before = target.memory
    peak = 0
    with httpx.Client(base_url=target.url) as client:
        for piece in (b"[],", b"{},"):
            response = client.post(INFER, content=b"[" + piece * (2 * MB) + b"0]")
            assert response.status_code == 400
            assert "flat" in response.json()["error"]
            peak = max(peak, target.memory - before)
    assert peak < 48 * MB
    target.assert_well()


@pytest.mark.parametrize(
    "beginning",
    [b"", b"POST ", b"POST /v2 HTTP/1.1\r\nHost: x\r\nX-Slow: "],
    ids=["silent", "request-line", "headers"],
)
def test_connections_that_say_nothing_are_closed(beginning, target):
    """Thousands of them cost little, and are gone after the time that headers may take."""
    before = target.memory
    idle = [socket.create_connection(target.address) for _ in range(2000)]
    try:
        for connection in idle:
            connection.sendall(beginning)
        target.wait(lambda: target.connections > 1000)
        target.assert_well()
        assert target.memory - before < 60 * MB
        target.wait(lambda: target.connections < 20)
    finally:
        for connection in idle:
            connection.close()
    target.assert_well()


def test_more_connections_than_fit_are_told_so(tmp_path):
    """Where 256 files may be open, 192 callers fit; the next hear 503, and none is left hanging."""
    with started(tmp_path, "sh", "-c", 'ulimit -n 256 && exec "$@"', "sh") as target:
        callers = [socket.create_connection(target.address, timeout=10) for _ in range(192)]
        try:
            target.wait(lambda: target.connections >= 192)
            for _ in range(60):
                with socket.create_connection(target.address, timeout=10) as one:
                    told = b"".join(iter(lambda one=one: one.recv(4096), b""))
                assert told.startswith(b"HTTP/1.1 503 ")
                assert b"too many connections" in told
        finally:
            for caller in callers:
                caller.close()
        target.wait(lambda: target.connections < 20)
        target.assert_well()


@pytest.mark.parametrize(
    "beginning",
    [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)],
    ids=["silent", "greeting"],
)
def test_many_idle_connections_keep_nobody_from_grpc(beginning, target):
    """A thousand that say nothing, or only hello, cost little; others are answered meanwhile."""
    before, parts = target.memory, urlsplit(target.grpc_url)
    address = parts.hostname, parts.port
    idle = [socket.create_connection(address) for _ in range(1000)]
    try:
        for connection in idle:
            connection.sendall(beginning)
        target.wait(lambda: target.connections >= 1000)
        target.assert_well()
        assert target.memory - before < 100 * MB
    finally:
        for connection in idle:
            connection.close()
    target.wait(lambda: target.connections < 20)
    target.assert_well()


def test_endless_headers_are_refused(target):
    """A header without an end is 431 and closed long before it fills the memory."""
    before = target.memory
    with socket.create_connection(target.address) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Endless: ")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 200 * MB:
                sent += connection.send(b"x" * 65536)
    assert sent < 20 * MB
    assert target.memory - before < 8 * MB
    target.assert_well()


def test_a_body_that_trickles_is_given_up(target):
    """A byte now and then does not keep a request alive."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(target.address, timeout=10) as connection:
        connection.sendall(head.encode())
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 3:
                connection.sendall(b" ")
                time.sleep(0.1)
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start < 8
    target.assert_well()


def test_callers_who_do_not_read_cannot_take_the_memory(target):
    """Large answers that nobody takes are bounded together, and gone when their time is over."""
    size = 4 * MB
    request = (
        f"POST /v2/models/wide/infer HTTP/1.1\r\nHost: x\r\n{JSON_SIZE_HEADER}: 0\r\n"
        f"Content-Length: {size}\r\n\r\n"
    ).encode() + bytes(size)
    before = target.memory
    deaf = []
    peak = 0
    try:
        for _ in range(40):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(5)
            connection.connect(target.address)
            deaf.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(request)
            peak = max(peak, target.memory - before)
        target.assert_well()
        # All are open still on the callers' side. The last has 2 s for each of what bounds it: its
        # body, its unread answer, and idleness if it was refused; the rest is for a busy machine.
        target.wait(lambda: target.connections == 0, timeout_s=20)
    finally:
        for connection in deaf:
            connection.close()
    assert peak < 120 * MB
    target.assert_well()


def test_many_callers_of_unknown_models_leave_no_trace(target):
    """Names that callers make up are neither labels nor entries that stay."""
    with httpx.Client(base_url=target.url) as client:
        for index in range(200):
            client.post(f"/v2/models/made-up-{index}/infer", content=GOOD)
        before = target.memory
        for index in range(2000):
            response = client.post(f"/v2/models/made-up-{index}{'x' * 500}/infer", content=GOOD)
            assert response.status_code == 404
            assert len(response.content) < 1000
    assert target.memory - before < 4 * MB


def test_large_messages_over_grpc_are_refused(target):
    """A message over the limit is an error of its sender, again and again, and costs nothing."""
    rows = np.ones((MB, 3), np.float32)
    with GrpcClient(target.grpc_url) as client:
        for round_ in range(24):
            if round_ == 8:
                before = target.memory
            with pytest.raises(InferenceError, match="larger than max"):
                client.infer("scaling", {"input": rows})
    assert target.memory - before < 64 * MB  # of 192 MB that came meanwhile
    target.assert_well()
