"""A replica without Ray around it: what it declares, swaps, and leaves to the registry."""

import asyncio
import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import httpx
import numpy as np
import pytest

from minga.cluster import template
from minga.cluster.project import load
from minga.inference.access import Protection
from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.errors import PortInUseError, RejectedError
from minga.inference.grpc_client import GrpcClient
from minga.inference.grpc_wire import SERVICE, write_request
from minga.inference.limits import Limits
from minga.inference.protocol import InferRequest
from minga.inference.server import listen
from minga.serving.key_store import KeyStore
from tests.serving.test_app import GOOD, assert_refused, decoded

pytestmark = pytest.mark.slow  # for Ray, which is imported

ROWS = np.ones((1, 3), np.float32)


def free_port() -> int:
    """Find a port that nobody has now."""
    with listen("127.0.0.1", 0) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextlib.asynccontextmanager
async def running(**options):
    """A replica that serves nothing yet, on ports that were free."""
    from minga.serving.application import InferenceReplica

    http, grpc = ({"host": "127.0.0.1", "port": free_port()} for _ in range(2))
    replica = InferenceReplica(
        options.pop("limits", Limits(model_control=True)), http, grpc=grpc, **options
    )
    replica.grpc_url = f"grpc://127.0.0.1:{grpc['port']}"
    yield replica
    await replica.end()


@pytest.fixture
async def replica():
    """A replica without protection that serves nothing yet."""
    async with running() as replica:
        yield replica


async def configure(replica, *refs) -> None:
    """Declare versions as a Serve config file does, in JSON."""
    from minga.serving.application import user_config

    config = json.loads(json.dumps(user_config(refs)))
    assert await replica.prepare(config) is None
    await replica.reconfigure(config)
    assert await replica.served() == config


async def test_both_wires_answer_with_what_is_declared(replica, models, write_model):
    """A version is swapped on both wires at once, and takes its baseline along."""
    first = write_model(models["scaling"](2))
    second = replace(write_model(models["scaling"](3), version="2"), baseline=(1.0, 2.0, 3.0))
    for ref, factor in ((first, 2), (second, 3)):
        await configure(replica, ref)
        with GrpcClient(replica.grpc_url) as client:
            found = await asyncio.to_thread(client.infer, "scaling", {"input": ROWS})
        async with httpx.AsyncClient(base_url=replica.url) as client:
            over_http = decoded(await client.post("/v2/models/scaling/infer", content=GOOD))
            explained = await client.post("/v2/models/scaling/explain", content=GOOD)
        np.testing.assert_array_equal(found["output"], ROWS * factor)
        assert over_http.model_version == ref.version
        assert explained.status_code == (200 if ref.baseline else 400)


async def test_a_replica_does_not_load_or_unload_alone(replica, models, write_model):
    """A replica that cannot reach the others changes nothing, and says that it may work later."""
    await configure(replica, write_model(models["scaling"](2)))
    # Where Ray runs, the replica looks for the others for a while.
    async with httpx.AsyncClient(base_url=replica.url, timeout=60) as client:
        for verb in ("load", "unload"):
            response = await client.post(f"/v2/repository/models/scaling/{verb}")
            assert_refused(response, 503)
        assert_refused(await client.post("/v2/repository/models/no/unload"), 404)
        assert (await client.get("/v2/models/scaling/ready")).status_code == 200


async def test_a_replica_lets_in_who_has_a_key(models, write_model, tmp_path):
    """Each replica checks keys itself, on both wires."""
    key, _ = KeyStore(tmp_path / "keys.json").create("shop")
    async with running(protection=Protection(keys=str(tmp_path / "keys.json"))) as replica:
        await configure(replica, write_model(models["scaling"](2)))
        for shown, status in ((key, 200), ("", 401)):
            headers = {"authorization": f"Bearer {shown}"} if shown else {}
            async with httpx.AsyncClient(base_url=replica.url) as client:
                response = await client.post(
                    "/v2/models/scaling/infer", content=GOOD, headers=headers
                )
            assert response.status_code == status
            with (
                GrpcClient(replica.grpc_url, credentials=Credentials(key=shown)) as client,
                contextlib.nullcontext() if shown else pytest.raises(RejectedError),
            ):
                await asyncio.to_thread(client.infer, "scaling", {"input": ROWS})


async def test_a_replica_takes_client_certificates(models, write_model, pem):
    """With a client CA, who shows a certificate of it is let in, and others are not."""
    protection = Protection(
        certificate=str(pem.server), certificate_key=str(pem.server_key), client_ca=str(pem.ca)
    )
    shown = Credentials(ca=pem.ca, certificate=pem.client, certificate_key=pem.client_key)
    async with running(protection=protection) as replica:
        await configure(replica, write_model(models["scaling"](2)))
        for credentials in (shown, Credentials(ca=pem.ca)):
            with (
                InferenceClient(replica.url, credentials=credentials) as client,
                contextlib.nullcontext() if credentials is shown else pytest.raises(RejectedError),
            ):
                await asyncio.to_thread(client.infer, "scaling", {"input": ROWS})


async def test_a_replica_that_ends_frees_its_ports(replica, models, write_model):
    """When it has ended, nobody answers at either port any more."""
    await configure(replica, write_model(models["scaling"](2)))
    urls = replica.url, replica.grpc_url
    with GrpcClient(replica.grpc_url, timeout_s=5) as client:
        assert await asyncio.to_thread(client.ready)
    await replica.end()
    for url in urls:
        listen("127.0.0.1", int(url.rsplit(":", 1)[1])).close()


async def test_a_replica_shares_its_ports_with_others(models, write_model):
    """A second one listens at the same ports; a server that does not share is in the way."""
    from minga.serving.application import InferenceReplica

    ref = write_model(models["scaling"](2))
    async with running() as first:
        await configure(first, ref)
        port = {"host": "127.0.0.1", "port": int(first.url.rsplit(":", 1)[1])}
        second = InferenceReplica(Limits(), port)
        await configure(second, ref)
        await second.end()
    with listen(**port):
        lonely = InferenceReplica(Limits(), port)
        with pytest.raises(PortInUseError):
            await configure(lonely, ref)


async def test_a_replica_is_well_where_kuberay_looks(replica, models, write_model):
    """KubeRay's readiness probe asks for this path, and looks for this word."""
    await configure(replica, write_model(models["scaling"](2)))
    await replica.check_health()
    async with httpx.AsyncClient(base_url=replica.url) as client:
        assert "success" in (await client.get("/-/healthz")).text


async def test_a_replica_tells_how_many_requests_it_has(models, write_model):
    """Requests of both wires count for autoscaling while they compute."""
    async with running(limits=Limits(num_threads=1, max_batch_rows=1)) as replica:
        await configure(replica, write_model(models["deep"](), name="deep"))
        assert (await replica.record_autoscaling_stats()) == {"requests_in_hand": 0}
        rows = np.zeros((1000, 512), np.float32)
        with InferenceClient(replica.url) as http, GrpcClient(replica.grpc_url) as grpc:
            asked = [asyncio.to_thread(one.infer, "deep", {"input": rows}) for one in (http, grpc)]
            working = asyncio.gather(*asked)
            most = 0.0
            while not working.done():
                await asyncio.sleep(0.02)
                most = max(most, *(await replica.record_autoscaling_stats()).values())
            await working
    assert most > 1


SETTINGS = """[serving]
cpus_per_replica = 1.0
threads_per_run = 2
objective_ms = 20.0
model_memory_mb = 1.5
"""


@pytest.fixture
async def set_up(tmp_path, models, write_model):
    """A replica with settings from a project's file, and two models of 1 MB of which one fits."""
    template.write(tmp_path / "plant")
    file = tmp_path / "plant" / "minga.toml"
    file.write_text(file.read_text().replace("[serving]\n", SETTINGS))
    config = load(tmp_path / "plant").serving
    async with running(limits=config.limits, models=config.models) as replica:
        content = models["deep"]()
        await configure(replica, *(write_model(content, name) for name in ("deep", "other")))
        yield replica


async def test_models_of_a_replica_keep_to_its_memory(set_up):
    """As `model_memory_mb` says one sleeps while the other answers, with `threads_per_run`."""
    rows = np.ones((1, 512), np.float32)
    async with httpx.AsyncClient(base_url=set_up.url) as client:
        for name, other in (("deep", "other"), ("other", "deep")):
            with InferenceClient(set_up.url) as asking:
                await asyncio.to_thread(asking.infer, name, {"input": rows})
            told = (await client.get("/metrics")).text
            for model, awake in ((name, "1.0"), (other, "0.0")):
                assert f'minga_inference_model_awake{{model="{model}",version="1"}} {awake}' in told
            options = set_up._repository.get(name, None)._session.get_session_options()
            assert options.intra_op_num_threads == 2


async def test_what_would_be_late_is_refused_on_both_wires(set_up):
    """As `objective_ms` says: 503 and UNAVAILABLE, each with when to try again, and at once."""
    rows = np.ones((64, 512), np.float32)
    request = write_request("deep", None, InferRequest(inputs={"input": rows}))
    body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": rows.shape}]}
    body["inputs"][0]["data"] = rows.ravel().tolist()
    statuses, waits = set(), []

    async def over_http(client) -> None:
        answer = await client.post("/v2/models/deep/infer", json=body)
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert_refused(answer, 503)
            waits.append(answer.headers["retry-after"])

    async def over_grpc(channel) -> None:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")(request.SerializeToString())
        status = await call.code()
        statuses.add(status)
        if status is not grpc.StatusCode.OK:
            waits.append(dict(await call.trailing_metadata())["retry-after"])

    async with (
        httpx.AsyncClient(base_url=set_up.url, limits=httpx.Limits(max_connections=60)) as client,
        grpc.aio.insecure_channel(set_up.grpc_url.removeprefix("grpc://")) as channel,
    ):
        await asyncio.gather(*(over_http(client) for _ in range(60)))
        await asyncio.gather(*(over_grpc(channel) for _ in range(60)))
    assert statuses == {200, 503, grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert all(int(wait) >= 1 for wait in waits)


async def test_a_refusal_is_not_asked_again_by_the_client(set_up):
    """Clients ask again where nobody has answered; who has been refused is told so at once."""
    rows = np.ones((64, 512), np.float32)
    refused = 0
    with GrpcClient(set_up.grpc_url) as client:

        def ask() -> None:
            nonlocal refused
            try:
                client.infer("deep", {"input": rows})
            except RejectedError as error:
                refused += error.status == 503

        with ThreadPoolExecutor(32) as callers:
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(callers, ask) for _ in range(96)))
    async with httpx.AsyncClient(base_url=set_up.url) as client:
        told = (await client.get("/metrics")).text
    counted = re.search(r'requests_total{model="deep",status="503",version="1"} (.*)', told)
    assert refused
    assert float(counted[1]) == refused
