"""A replica without Ray around it: what it declares, swaps, and leaves to the registry."""

import asyncio
import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest

from minga.inference.access import Protection
from minga.inference.credentials import Credentials
from minga.inference.errors import RejectedError
from minga.inference.grpc_client import GrpcClient
from minga.inference.limits import Limits
from minga.inference.server import listen
from minga.serving.key_store import KeyStore
from tests.serving.test_app import GOOD, assert_refused, connect, decoded

pytestmark = pytest.mark.slow  # for Ray, which is imported

ROWS = np.ones((1, 3), np.float32)


@pytest.fixture
async def replica():
    """A replica that serves nothing yet, with gRPC on a port that was free."""
    from minga.serving.application import InferenceReplica

    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    replica = InferenceReplica(Limits(model_control=True), grpc={"host": "127.0.0.1", "port": port})
    replica.grpc_url = f"grpc://127.0.0.1:{port}"
    yield replica
    await end(replica)


async def end(replica) -> None:
    """End a replica as Ray Serve does: by the lifespan of its application."""
    sent = []

    async def receive():
        return {"type": "lifespan.shutdown"}

    async def send(message):
        sent.append(message["type"])

    await replica.__serve_build_asgi_app__()({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.shutdown.complete"]


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
    app = replica.__serve_build_asgi_app__()
    for ref, factor in ((first, 2), (second, 3)):
        await configure(replica, ref)
        with GrpcClient(replica.grpc_url) as client:
            found = await asyncio.to_thread(client.infer, "scaling", {"input": ROWS})
        async with connect(app) as client:
            over_http = decoded(await client.post("/v2/models/scaling/infer", content=GOOD))
            explained = await client.post("/v2/models/scaling/explain", content=GOOD)
        np.testing.assert_array_equal(found["output"], ROWS * factor)
        assert over_http.model_version == ref.version
        assert explained.status_code == (200 if ref.baseline else 400)


async def test_a_replica_does_not_load_or_unload_alone(replica, models, write_model):
    """A replica that cannot reach the others changes nothing, and says that it may work later."""
    await configure(replica, write_model(models["scaling"](2)))
    async with connect(replica.__serve_build_asgi_app__()) as client:
        for verb in ("load", "unload"):
            response = await client.post(f"/v2/repository/models/scaling/{verb}")
            assert_refused(response, 503)
        assert_refused(await client.post("/v2/repository/models/no/unload"), 404)
        assert (await client.get("/v2/models/scaling/ready")).status_code == 200


async def test_a_replica_lets_in_who_has_a_key(models, write_model, tmp_path):
    """Each replica checks keys itself, on both wires: there are ways to it around the proxy."""
    from minga.serving.application import InferenceReplica

    key, _ = KeyStore(tmp_path / "keys.json").create("shop")
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    protection = Protection(keys=str(tmp_path / "keys.json"))
    replica = InferenceReplica(
        Limits(), grpc={"host": "127.0.0.1", "port": port}, protection=protection
    )
    await configure(replica, write_model(models["scaling"](2)))
    for shown, status in ((key, 200), ("", 401)):
        headers = {"authorization": f"Bearer {shown}"}
        async with connect(replica.__serve_build_asgi_app__()) as client:
            response = await client.post("/v2/models/scaling/infer", content=GOOD, headers=headers)
        assert response.status_code == status
        url = f"grpc://127.0.0.1:{port}"
        with (
            GrpcClient(url, credentials=Credentials(key=shown)) as client,
            contextlib.nullcontext() if shown else pytest.raises(RejectedError),
        ):
            await asyncio.to_thread(client.infer, "scaling", {"input": ROWS})
    await end(replica)


async def test_a_replica_that_ends_closes_its_grpc_port(replica, models, write_model):
    """When its application ends, nobody answers at the port any more."""
    await configure(replica, write_model(models["scaling"](2)))
    with GrpcClient(replica.grpc_url, timeout_s=5) as client:
        assert await asyncio.to_thread(client.ready)
    await end(replica)
    port = int(replica.grpc_url.rsplit(":", 1)[1])
    listen("127.0.0.1", port).close()
