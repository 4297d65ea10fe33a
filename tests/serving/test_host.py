"""Ray Serve as the host: the same answers, and versions exchanged without failing a request."""

import gzip
import os
import signal
import time

import httpx
import numpy as np
import pytest

from minga.inference.client import InferenceClient
from minga.inference.errors import PortInUseError, RejectedError
from minga.inference.grpc_client import GrpcClient
from minga.inference.protocol import JSON_SIZE_HEADER, InferRequest
from minga.inference.server import listen
from minga.serving.config import ServingConfig
from minga.serving.errors import VersionRefusedError

pytestmark = pytest.mark.slow

ROWS = np.array([[1, 2, 3]], np.float32)


@pytest.fixture(scope="module")
def host(ray_cluster):
    """Two replicas that serve nothing yet."""
    from minga.serving.host import start

    config = ServingConfig(port=0, grpc_port=0, num_replicas=2, cpus_per_replica=0.5)
    running = start(config, [])
    yield running
    running.stop()


@pytest.fixture
def refs(models, write_model):
    """Five versions of a model that scales by its version's number."""
    return [write_model(models["scaling"](k), version=str(k)) for k in range(1, 6)]


def replica_pids() -> set[int]:
    """Find the processes of the living replicas."""
    from ray._private.state import actors

    return {
        actor["Pid"]
        for actor in actors().values()
        if actor["ActorClassName"].startswith("ServeReplica:minga") and actor["State"] == "ALIVE"
    }


def test_a_swap_under_load_fails_no_request_and_restarts_nothing(host, refs, load):
    """Five swaps on two replicas while callers never pause: no failure, the same processes."""
    host.deploy(refs[:1])
    host.wait_ready()
    before = replica_pids()
    with load(host.url) as callers:
        for ref in refs:
            host.deploy([ref])
            callers.wait_for(float(ref.version))
    assert callers.failures == []
    assert len(before) == 2
    assert replica_pids() == before


def test_after_deploy_every_answer_is_of_the_new_version(host, refs):
    """When deploy returns, no replica answers with the old version any more."""
    with InferenceClient(host.url) as client:
        for ref in refs[:3]:
            host.deploy([ref])
            answers = {
                client.request("scaling", InferRequest(inputs={"input": ROWS})).model_version
                for _ in range(40)
            }
            assert answers == {ref.version}


def test_a_bad_version_leaves_the_old_one_serving(host, refs, models, write_model, load):
    """A version that fails its self-test is refused with the reason; no request notices."""
    host.deploy(refs[:1])
    bad = write_model(models["failing"](), version="99")
    with load(host.url) as callers:
        callers.wait_for(1.0)
        with pytest.raises(VersionRefusedError, match=r"self-test.*served still"):
            host.deploy([bad])
        host.deploy(refs[1:2])
        callers.wait_for(2.0)
    assert callers.failures == []


def test_the_protocol_survives_the_proxy(host, refs, models, write_model):
    """Headers, raw tensors, compression, versions and errors pass through Ray Serve unchanged."""
    total = write_model(models["sum"](), name="sum")
    host.deploy([refs[1], refs[0], total])
    body = b'{"id":"7","inputs":[{"name":"input","datatype":"FP32","shape":[1,3],"data":[1,2,3]}]}'
    with httpx.Client(base_url=host.url) as http:
        packed = http.post(
            "/v2/models/scaling/infer",
            content=gzip.compress(body),
            headers={"content-encoding": "gzip"},
        )
        raw = http.post(
            "/v2/models/scaling/versions/1/infer",
            content=ROWS.tobytes(),
            headers={JSON_SIZE_HEADER: "0"},
        )
        assert packed.json()["id"] == "7"
        assert packed.json()["outputs"][0]["data"] == [2, 4, 6]
        assert raw.content.endswith(ROWS.tobytes())
        assert JSON_SIZE_HEADER in raw.headers
        assert http.get("/v2/models").json() == {"models": ["scaling", "sum"]}
        assert http.get("/v2/models/scaling").json()["versions"] == ["2", "1"]
        assert "minga_inference_requests_total" in http.get("/metrics").text
        for path, status in (("/v2/models/no/infer", 404), ("/v2/models/sum/infer", 400)):
            refused = http.post(path, content=b"{")
            assert (refused.status_code, list(refused.json())) == (status, ["error"])


def test_grpc_reaches_every_replica(host, refs):
    """Each connection is one replica's; all replicas answer, with the version of the last swap."""
    host.deploy(refs[:1])
    host.deploy(refs[1:2])
    for _ in range(16):
        with GrpcClient(host.grpc_url) as client:
            output = client.infer("scaling", {"input": ROWS})["output"]
            np.testing.assert_array_equal(output, ROWS * 2)
            with pytest.raises(RejectedError) as refused:
                client.infer("no", {"input": ROWS})
            assert refused.value.status == 404
    counts = set()
    for _ in range(20):
        stats = httpx.get(f"{host.url}/v2/models/scaling/stats").json()["model_stats"][0]
        counts.add(stats["execution_count"])
    # Both replicas have answered, be it in equal shares.
    assert counts == {8} or (len(counts) == 2 and sum(counts) == 16 and 0 not in counts)


def test_a_killed_replica_comes_back_with_what_is_declared(host, refs):
    """A replica that starts again loads the versions of the last rollout, not of the first."""
    host.deploy(refs[2:3])
    before = replica_pids()
    os.kill(min(before), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(replica_pids() - before) < 1 or len(replica_pids()) != 2:
        assert time.monotonic() < deadline, "the replica does not come back"
        time.sleep(0.1)
    host.deploy(refs[2:3])
    with InferenceClient(host.url) as client:
        factors = {
            float(client.infer("scaling", {"input": ROWS})["output"][0, 0]) for _ in range(40)
        }
    assert factors == {3.0}


def test_what_is_not_declared_any_more_is_gone(host, refs, models, write_model):
    """A model that leaves the declaration is unknown; the others go on."""
    host.deploy([refs[0], write_model(models["sum"](), name="sum")])
    host.deploy(refs[:1])
    with InferenceClient(host.url) as client:
        assert client.ready("scaling")
        with pytest.raises(RejectedError) as refusal:
            client.metadata("sum")
    assert refusal.value.status == 404


def test_a_taken_port_is_refused_before_anything_starts():
    """The port is checked first, so the message comes at once and nothing must be undone."""
    from minga.serving.host import start

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=str(port)):
            start(ServingConfig(port=port), [])
