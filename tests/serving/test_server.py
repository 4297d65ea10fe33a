"""A real server on loopback: ports, swaps under load, hostile connections, clean ends."""

import asyncio
import socket
import statistics
import threading
import time

import httpx
import numpy as np
import pytest

from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.errors import ClientError, InferenceError, PortInUseError
from minga.inference.limits import Limits
from minga.inference.repository import ModelRepository
from minga.inference.server import Server, listen, url_host
from tests.serving.conftest import running


@pytest.fixture
def refs(models, write_model):
    """Ten versions of a model that scales by its version's number."""
    return [write_model(models["scaling"](k), version=str(k)) for k in range(1, 11)]


async def test_a_taken_port_is_one_clear_error(make_app, models):
    """The second server on a port is refused before it starts, with a remedy."""
    app = make_app(scaling=models["scaling"](1))
    async with Server(app, port=0) as first:
        with pytest.raises(PortInUseError, match=f"port {first.port} .* in use"):
            await Server(app, port=first.port).start()


async def test_a_port_is_free_again_after_stop(make_app, models):
    """A server can be started anew on the port that another one left."""
    async with Server(make_app(scaling=models["scaling"](1)), port=0) as first:
        port = first.port
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{first.url}/v2/health/ready")).status_code == 200
    async with Server(make_app(scaling=models["scaling"](1)), port=port) as second:
        assert second.port == port


async def test_an_address_of_another_machine_is_one_clear_error(make_app, models):
    """An address that is not ours is refused with a remedy."""
    with pytest.raises(InferenceError, match="another address"):
        await Server(make_app(scaling=models["scaling"](1)), host="192.0.2.1", port=0).start()


async def test_an_application_that_refuses_to_start_frees_the_port():
    """If the application fails on its way up, start says so and the port is free again."""

    async def broken(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(InferenceError, match="refused to start"):
        await Server(broken, port=port).start()
    listen("127.0.0.1", port).close()


async def test_stopping_a_server_that_never_started_does_nothing(make_app, models):
    """Stop is safe at any time."""
    await Server(make_app(scaling=models["scaling"](1))).stop()


async def test_stop_lets_a_running_request_finish(make_app, models):
    """A request that has begun before stop is answered."""
    app = make_app(scaling=models["scaling"](2))
    server = Server(app, port=0)
    await server.start()
    body_began = asyncio.Event()
    stopping = asyncio.Event()

    async def slow_body():
        yield b'{"inputs":[{"name":"input","datatype":"FP32","shape":[1,3],'
        body_began.set()
        await stopping.wait()
        yield b'"data":[1,2,3]}]}'

    async with httpx.AsyncClient() as client:
        url = f"{server.url}/v2/models/scaling/infer"
        request = asyncio.create_task(client.post(url, content=slow_body()))
        await body_began.wait()
        await client.get(f"{server.url}/v2/health/live")  # the body's first part has arrived
        stop = asyncio.create_task(server.stop())
        stopping.set()
        response = await request
    await stop
    assert response.json()["outputs"][0]["data"] == [2, 4, 6]


@pytest.mark.parametrize(
    ("host", "named"),
    [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("node-7", "node-7")],
)
def test_urls_name_addresses_that_clients_can_reach(host, named):
    """Addresses that mean every interface are no address to connect to."""
    assert url_host(host) == named


def test_a_swap_under_load_fails_no_request(refs, serve, load):
    """Nine swaps while callers never pause: no failure, and each answer is of one version."""
    repository = ModelRepository()
    repository.apply(refs[:1])
    with serve(InferenceApp(repository)) as url, load(url) as callers:
        for ref in refs:
            repository.apply([ref])
            callers.wait_for(float(ref.version))
    assert callers.failures == []
    assert set(callers.factors) == {float(ref.version) for ref in refs}


def test_a_bad_version_under_load_fails_no_request(refs, write_model, models, serve, load):
    """A version that cannot be loaded is refused while the old one goes on answering."""
    repository = ModelRepository()
    repository.apply(refs[:1])
    bad = write_model(models["failing"](), version="99")
    with serve(InferenceApp(repository)) as url, load(url) as callers:
        callers.wait_for(1.0)
        with pytest.raises(InferenceError, match="self-test"):
            repository.apply([bad])
        repository.apply(refs[1:2])
        callers.wait_for(2.0)
    assert callers.failures == []


def test_health_is_answered_while_a_model_computes(make_app, models, serve):
    """A slow model leaves the event loop free, so it does not look like a dead server."""
    app = make_app(Limits(num_threads=1), deep=models["deep"]())
    done = threading.Event()

    def compute(url):
        with InferenceClient(url) as client:
            client.infer("deep", {"input": np.zeros((2000, 512), np.float32)})
        done.set()

    with serve(app) as url, InferenceClient(url) as client:
        worker = threading.Thread(target=compute, args=(url,))
        worker.start()
        num_answers = 0
        while not done.is_set():
            num_answers += client.ready()
        worker.join()
    assert num_answers > 1


def test_small_answers_are_not_held_back(make_app, models, serve):
    """No answer waits for the acknowledgement of the one before, which costs 40 ms on Linux."""
    durations = []
    with serve(make_app(scaling=models["scaling"](1))) as url, InferenceClient(url) as client:
        for _ in range(60):
            start = time.perf_counter()
            client.infer("scaling", {"input": np.ones((1, 3), np.float32)})
            durations.append(time.perf_counter() - start)
    # A fresh connection is acknowledged at once, and other work may delay some answers.
    assert statistics.quantiles(durations[20:])[0] < 0.03


def test_a_body_over_the_limit_is_refused_over_the_wire(make_app, models, serve):
    """A caller that announces too much is told so, and the server goes on."""
    app = make_app(Limits(max_body_bytes=100_000), scaling=models["scaling"](1))
    with serve(app) as url:
        response = httpx.post(f"{url}/v2/models/scaling/infer", content=bytes(5_000_000))
        assert response.status_code == 413
        assert "limit" in response.json()["error"]
        with InferenceClient(url) as client:
            assert client.ready("scaling")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET\r\n\r\n",
        b"POST /v2/models/scaling/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n",
        b"GET /v2/\xff\xfe%FF%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000 + b"\r\nConnection: close\r\n\r\n",
    ],
    ids=["tls", "no-version", "negative-length", "bad-chunk", "odd-path", "huge-header"],
)
def test_hostile_connections_get_a_4xx_and_the_server_lives(request_bytes, make_app, models, serve):
    """Bytes that are no request of ours are answered with a 4xx or a closed connection."""
    with serve(make_app(scaling=models["scaling"](1))) as url:
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(request_bytes)
            raw.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        with InferenceClient(url) as client:
            assert client.ready()


class Newcomers(threading.Thread):
    """A caller with a new connection for each request, who tries nothing twice."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.num_answers = 0
        self.failures: list[str] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        with httpx.Client(headers={"connection": "close"}) as client:
            while not self.stopped.is_set():
                try:
                    client.get(f"{self.url}/v2/health/ready").raise_for_status()
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                else:
                    self.num_answers += 1


def test_a_server_leaves_a_shared_port_without_cutting_a_connection(make_app, models):
    """Of two at one port one leaves under load; who asks again and again, or anew, fails never."""
    app = make_app(scaling=models["scaling"](1))
    staying = Server(app, port=0, shared=True)
    with running(staying):
        leaving = Server(make_app(scaling=models["scaling"](2)), port=staying.port, shared=True)
        failures: list[str] = []
        factors: list[float] = []
        stop = threading.Event()

        def call():
            with InferenceClient(staying.url, retries=0) as client:
                while not stop.is_set():
                    try:
                        output = client.infer("scaling", {"input": np.ones((1, 3), np.float32)})
                        factors.append(float(output["output"][0, 0]))
                    except ClientError as error:
                        failures.append(str(error))

        callers = [threading.Thread(target=call) for _ in range(12)]
        newcomers = Newcomers(staying.url)
        with running(leaving):
            for caller in (*callers, newcomers):
                caller.start()
            deadline = time.monotonic() + 10
            while {1.0, 2.0} - set(factors) or newcomers.num_answers < 20:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        num_answers = len(factors)
        while len(factors) < num_answers + 100:
            time.sleep(0.01)
        assert set(factors[num_answers + 12 :]) == {1.0}
        stop.set()
        newcomers.stopped.set()
        for caller in (*callers, newcomers):
            caller.join()
    assert failures + newcomers.failures == []


async def test_who_is_connected_hears_that_a_shared_port_is_left(make_app, models):
    """An open connection is answered once more, told to end, and ended; others come no more."""
    server = Server(make_app(scaling=models["scaling"](1)), port=0, shared=True)
    await server.start()
    port = server.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    for stopping in (False, True):
        if stopping:
            stop = asyncio.create_task(server.stop())
            await asyncio.sleep(0.1)  # else it might come in before the door closes
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n")
        answers.append(await reader.readuntil(b"}"))
    assert await reader.read() == b""
    await stop
    writer.close()
    assert [b"connection: close" in answer for answer in answers] == [False, True]
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


def test_connections_to_a_shared_port_end_so_that_others_get_some(make_app, models, monkeypatch):
    """A caller that keeps its connection comes to the other server in the end, and fails never."""
    monkeypatch.setattr("minga.inference.server._MAX_AGE_S", 0.02)
    one = Server(make_app(scaling=models["scaling"](1)), port=0, shared=True)
    with running(one):
        other = Server(make_app(scaling=models["scaling"](2)), port=one.port, shared=True)
        seen = set()
        with running(other), InferenceClient(one.url, retries=0) as client:
            deadline = time.monotonic() + 10
            while len(seen) < 2 and time.monotonic() < deadline:
                output = client.infer("scaling", {"input": np.ones((1, 3), np.float32)})["output"]
                seen.add(float(output[0, 0]))
    assert seen == {1.0, 2.0}
