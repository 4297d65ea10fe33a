"""A replica without Ray around it: what it declares, swaps, and leaves to the registry."""

import asyncio
import contextlib
import json
from dataclasses import replace

import httpx
import numpy as np
import pytest

from minga.inference.access import Protection
from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.errors import PortInUseError, RejectedError
from minga.inference.grpc_client import GrpcClient
from minga.inference.limits import Limits
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
