"""Ray Serve as the host: the same answers, and versions exchanged without failing a request."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from minga.inference.client import InferenceClient
from minga.inference.comparing import Mode
from minga.inference.errors import PortInUseError, RejectedError
from minga.inference.grpc_client import GrpcClient
from minga.inference.protocol import JSON_SIZE_HEADER
from minga.inference.server import listen
from minga.serving.book import MemoryBook, Plan, Status
from minga.serving.config import ComparisonConfig, ServingConfig
from minga.serving.errors import VersionRefusedError
from minga.serving.referee import Referee
from minga.serving.watcher import MemorySource, Watcher
from tests.cluster.watched import program
from tests.serving.third_parties import triton_models, triton_outcomes

pytestmark = pytest.mark.slow

ROWS = np.array([[1, 2, 3]], np.float32)

IMPATIENCE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""How soon Ray takes a machine for lost; by default after 13 s."""


@pytest.fixture(scope="module")
def host(ray_cluster):
    """Two replicas that serve nothing yet."""
    from minga.serving.host import start

    config = ServingConfig(
        port=0, grpc_port=0, num_replicas=2, cpus_per_replica=0.5, model_control=True
    )
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


def wait_until(is_done, what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextlib.contextmanager
def reconnecting(host):
    """A client with a new connection for each request, so that every replica gets some."""
    with httpx.Client(base_url=host.url, headers={"connection": "close"}) as client:
        yield client


def replicas_ready(host, model: str) -> set[int]:
    """Ask so often whether a model is ready that every replica has surely answered."""
    with reconnecting(host) as client:
        return {client.get(f"/v2/models/{model}/ready").status_code for _ in range(40)}


def ask_all(host) -> list[dict]:
    """Ask the model that scales so often that every replica has surely answered."""
    rows = {"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    with reconnecting(host) as client:
        return [
            client.post("/v2/models/scaling/infer", json={"inputs": [rows]}).json()
            for _ in range(40)
        ]


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
    for ref in refs[:3]:
        host.deploy([ref])
        assert {answer["model_version"] for answer in ask_all(host)} == {ref.version}


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


def test_the_protocol_is_the_same_on_ray(host, refs, models, write_model):
    """Headers, raw tensors, compression, versions and errors are those of one process."""
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


def test_tritonclient_on_ray(host, third_party, tmp_path):
    """The cases of `test_conformance`, loading and unloading among them, with two replicas.

    All but statistics, which are those of the replica that a connection is with.
    """
    host.deploy(triton_models(tmp_path))
    host.wait_ready()
    told = triton_outcomes(third_party, host.url, host.grpc_url)
    kept = {case: words for case, words in told.items() if "statistics" not in case}
    assert len(kept) == len(told) - 2
    assert {case: words for case, words in kept.items() if words is not None} == {}


def executions(host) -> set[int]:
    """Tell how often replicas have computed the model's default version."""
    with reconnecting(host) as client:
        answers = [client.get("/v2/models/scaling/stats").json() for _ in range(30)]
    return {answer["model_stats"][0]["execution_count"] for answer in answers}


def test_both_wires_reach_every_replica(host, refs):
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
    over_grpc = executions(host)
    # Both replicas have answered, be it in equal shares.
    assert over_grpc == {8} or (sum(over_grpc) == 16 and 0 not in over_grpc)
    ask_all(host)
    over_both = executions(host)
    assert over_both == {28} or (sum(over_both) == 56 and min(over_both) > min(over_grpc))


def test_a_killed_replica_comes_back_with_what_is_declared(host, refs, load, write_model, models):
    """No request fails, and the new one serves the last rollout, without what was unloaded.

    That is so for clients that ask again, as ours do by themselves. Callers who do not see broken
    connections, which are counted here, and nothing else; no answer is wrong.
    """
    host.deploy([*refs[2:3], write_model(models["sum"](), name="sum")])
    httpx.post(f"{host.url}/v2/repository/models/sum/unload").raise_for_status()
    before = replica_pids()
    wires = (host.url, host.grpc_url)
    patient, hasty = ([load(url, retries=retries) for url in wires] for retries in (3, 0))
    with contextlib.ExitStack() as stack:
        for callers in (*patient, *hasty):
            stack.enter_context(callers).wait_for(3.0)
        os.kill(min(before), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(replica_pids() - before) < 1 or len(replica_pids()) != 2:
            assert time.monotonic() < deadline, "the replica does not come back"
            time.sleep(0.1)
    assert [callers.failures for callers in patient] == [[], []]
    assert {factor for callers in (*patient, *hasty) for factor in callers.factors} == {3.0}
    resets = [callers.failures for callers in hasty]
    print("broken connections of callers who do not ask again:", *map(len, resets))  # noqa: T201
    assert all("no inference server answers" in words for each in resets for words in each)
    assert replicas_ready(host, "sum") == {404}
    host.deploy(refs[2:3])
    assert {answer["outputs"][0]["data"][0] for answer in ask_all(host)} == {3.0}


def test_callers_load_and_unload_in_every_replica(host, refs):
    """Whichever replica is asked, all of them do it."""
    host.deploy(refs[:1])
    for verb, status in (("unload", 404), ("load", 200)):
        httpx.post(f"{host.url}/v2/repository/models/scaling/{verb}").raise_for_status()
        assert replicas_ready(host, "scaling") == {status}


def answered(host) -> float | None:
    """Scrape once, with a connection of its own: how often version 1 has answered in all.

    None if the scrape meets a replica that is stopped or gone, or is refused for the moment.
    """
    try:
        response = httpx.get(f"{host.url}/metrics", timeout=2)
    except httpx.TransportError:
        return None
    if response.status_code != 200:
        assert response.status_code == 503, response.text
        return None
    wanted = 'minga_inference_requests_total{model="scaling",status="200",version="1"} '
    lines = [line for line in response.text.splitlines() if line.startswith(wanted)]
    return float(lines[0].removeprefix(wanted)) if lines else 0.0


class Scrapes:
    """Scrapes that meet either replica, of which none may tell less than the one before."""

    def __init__(self, host) -> None:
        self._host = host
        self.last = answered(host)

    def wait_for(self, count: float) -> None:
        """Scrape until this many requests are told of, ten times running."""
        deadline, times = time.monotonic() + 40, 0
        while times < 10:
            assert time.monotonic() < deadline, f"{self.last} of {count}"
            if (told := answered(self._host)) is None:
                continue
            assert told >= self.last
            self.last, times = told, times + 1 if told == count else 0


@pytest.fixture
def told_of_one(host, refs):
    """Version 1 on both replicas, asked 40 times; its scrapes, and what they have come to."""
    host.deploy(refs[:1])
    host.wait_ready()
    scrapes = Scrapes(host)
    asked = scrapes.last + 40
    assert {answer["model_version"] for answer in ask_all(host)} == {"1"}
    scrapes.wait_for(asked)
    return scrapes, asked


def test_any_scrape_tells_of_all_replicas(host, told_of_one):
    """Scrapes alternate between replicas, and agree; one that hangs fails none of the other's."""
    scrapes, asked = told_of_one
    hung = min(replica_pids())
    os.kill(hung, signal.SIGSTOP)
    try:
        told = [answered(host) for _ in range(6)]
    finally:
        os.kill(hung, signal.SIGCONT)
    assert set(told) <= {None, asked}
    scrapes.wait_for(asked)


def test_the_exposition_of_replicas_is_the_fields_way(host, told_of_one):
    """`promtool check metrics` finds nothing to say of what replicas tell together."""
    exposition = httpx.get(f"{host.url}/metrics").content
    words = [program("promtool"), "check", "metrics"]
    done = subprocess.run(words, input=exposition, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_counters_never_fall(host, told_of_one):
    """What a killed replica counted is kept; so is all, where the actor that adds up is killed."""
    import ray

    scrapes, asked = told_of_one
    before = replica_pids()
    os.kill(min(before), signal.SIGKILL)
    scrapes.wait_for(asked)
    wait_until(lambda: len(replica_pids() - before) == 1, "the replica does not come back")
    host.wait_ready()
    ask_all(host)
    scrapes.wait_for(asked + 40)
    actor = ray.get_actor("minga-metrics", namespace="minga")
    ray.kill(actor, no_restart=False)
    scrapes.wait_for(asked + 40)
    ask_all(host)
    scrapes.wait_for(asked + 80)


def follow(watcher: Watcher, book: MemoryBook, status: Status) -> None:
    """Look again and again until the story has come to this."""
    deadline = time.monotonic() + 60
    while (story := book.read("scaling")[1]) is None or story.status is not status:
        assert time.monotonic() < deadline, f"the story stays {story}"
        watcher.check()
        time.sleep(0.05)


def test_canaries_pass_and_are_rolled_back_under_load(host, refs, models, write_model, load):
    """On two replicas a good version takes over and a bad one goes; no request fails."""
    config = {"shares": [0.3], "min_requests": 100, "hold_s": 0.0, "max_latency_ratio": 50.0}
    bad = write_model(models["gathering"](), version="9")
    known = {ref.version: ref for ref in (*refs, bad)}
    book = MemoryBook()
    referee = Referee(
        book, ComparisonConfig.model_validate(config), lambda _, version: known[version]
    )
    host.deploy(refs[:1])
    watcher = Watcher(MemorySource(refs[:1]), refs[:1], host, referee)
    with load(host.url) as callers:
        for version, status in (("9", Status.ROLLED_BACK), ("2", Status.PASSED)):
            book.plan("scaling", Plan(id=version, mode=Mode.CANARY, version=version))
            follow(watcher, book, status)
        callers.wait_for(2.0)
    assert callers.failures == []
    assert [ref.version for ref in watcher.served] == ["2"]
    with InferenceClient(host.url) as client:
        assert client.metadata("scaling")["versions"] == ["2"]


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


def test_the_port_of_another_service_is_not_shared(host):
    """Replicas share their port with one another, and with no other service of this user."""
    from minga.serving.host import claim_port

    with pytest.raises(PortInUseError):
        claim_port("127.0.0.1", int(host.url.rsplit(":", 1)[1]))


def test_a_lost_machine_fails_no_request(refs):
    """Of a Ray of three machines one is lost under load: who asks again notices nothing."""
    from minga.cluster.stack import ray_environment

    environment = os.environ | ray_environment() | IMPATIENCE
    words = [sys.executable, "-m", "tests.serving.lose_node", refs[0].path, refs[0].sha256]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert told["failures"] == []
    assert min(told["answered"]) > 300
    assert told["factors"] == [1.0]
    print("broken connections of callers who do not ask again:", len(told["resets"]))  # noqa: T201
    assert all("no inference server answers" in words for words in told["resets"])
