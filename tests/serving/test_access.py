"""Who is let in over both wires: keys, roles, limits of rate, TLS, client certificates."""

import contextlib
import datetime as dt
import json
import logging
import socket
import ssl
import time
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from minga.inference.access import Protection
from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.errors import AccessError, ClientError, RejectedError, ServerUnreachableError
from minga.inference.grpc_client import GrpcClient
from minga.inference.grpc_server import GrpcServer
from minga.inference.keys import Role
from minga.inference.limits import Limits
from minga.inference.repository import ModelRepository
from minga.inference.server import Server
from minga.inference.v2 import open_inference_pb2 as pb
from minga.serving.key_store import KeyStore
from tests.serving.certificates import issue
from tests.serving.conftest import ref_of, running, scaling_model
from tests.serving.test_app import GOOD

ROWS = np.ones((1, 3), np.float32)
SERVICE = "/inference.GRPCInferenceService/"


@dataclass(frozen=True)
class Place:
    """Two servers of one service, and keys of each role."""

    http: str
    grpc: str
    store: KeyStore
    keys: dict[Role, str]

    def clients(self, key: str = "", **files: Path):
        """Clients of both wires that show this."""
        shown = Credentials(key=key, **files)
        yield InferenceClient(self.http, credentials=shown)
        yield GrpcClient(self.grpc, credentials=shown)


@contextlib.contextmanager
def place(folder: Path, protection: Protection):
    """Serve a model over both wires, protected."""
    repository = ModelRepository()
    repository.apply([ref_of(folder, scaling_model(2), "scaling")])
    app = InferenceApp(repository, limits=Limits(model_control=True), access=protection.access())
    tls = protection.tls()
    http, rpc = Server(app, port=0, tls=tls), GrpcServer(app.service, port=0, tls=tls)
    with running(http, rpc):
        yield http.url, rpc.url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Servers without TLS that want keys."""
    folder = tmp_path_factory.mktemp("guarded")
    store = KeyStore(folder / "keys.json")
    keys = {role: store.create(role, role=role)[0] for role in Role}
    with place(folder, Protection(keys=str(folder / "keys.json"))) as (http, rpc):
        yield Place(http=http, grpc=rpc, store=store, keys=keys)


@pytest.fixture(scope="module")
def certified(tmp_path_factory, pem):
    """Servers with TLS that want a key or a certificate."""
    folder = tmp_path_factory.mktemp("certified")
    store = KeyStore(folder / "keys.json")
    keys = {role: store.create(role, role=role)[0] for role in Role}
    protection = Protection(
        keys=str(folder / "keys.json"),
        certificate=str(pem.server),
        certificate_key=str(pem.server_key),
        client_ca=str(pem.ca),
    )
    with place(folder, protection) as (http, rpc):
        yield Place(http=http, grpc=rpc, store=store, keys=keys)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory, pem):
    """Servers with TLS alone, for everyone."""
    folder = tmp_path_factory.mktemp("encrypted")
    protection = Protection(certificate=str(pem.server), certificate_key=str(pem.server_key))
    with place(folder, protection) as (http, rpc):
        yield Place(http=http, grpc=rpc, store=KeyStore(folder / "none"), keys={})


def answers(client) -> bool:
    """Ask a model; the answer must be right if there is one."""
    with client:
        outputs = client.infer("scaling", {"input": ROWS})
    np.testing.assert_array_equal(outputs["output"], ROWS * 2)
    return True


@pytest.mark.parametrize("role", [Role.CALLER, Role.OPERATOR])
def test_keys_open_both_wires(role, guarded):
    """A caller's and an operator's key ask models over HTTP and gRPC."""
    assert all(answers(client) for client in guarded.clients(guarded.keys[role]))


@pytest.mark.parametrize("key", ["", "minga_000000000000_x", "hunter2"], ids=["none", "id", "word"])
def test_without_a_key_that_counts_nobody_asks(key, guarded):
    """401 with a challenge; the words do not tell a wrong key from none."""
    for client in guarded.clients(key):
        with client, pytest.raises(RejectedError, match="wants an API key") as refused:
            client.infer("scaling", {"input": ROWS})
        assert refused.value.status == 401
    response = httpx.get(f"{guarded.http}/v2/models")
    assert response.headers["www-authenticate"].startswith("Bearer")


PATHS = {
    ("GET", "/v2/health/live"): set(Role) | {None},
    ("GET", "/v2/health/ready"): set(Role) | {None},
    ("GET", "/v2"): {Role.CALLER, Role.OPERATOR},
    ("GET", "/v2/models"): {Role.CALLER, Role.OPERATOR},
    ("GET", "/v2/models/scaling"): {Role.CALLER, Role.OPERATOR},
    ("GET", "/v2/models/scaling/ready"): {Role.CALLER, Role.OPERATOR},
    ("GET", "/openapi.json"): {Role.CALLER, Role.OPERATOR},
    ("POST", "/v2/models/scaling/infer"): {Role.CALLER, Role.OPERATOR},
    ("POST", "/v2/repository/index"): {Role.CALLER, Role.OPERATOR},
    ("POST", "/v2/repository/models/scaling/load"): {Role.OPERATOR},
    ("GET", "/v2/models/stats"): {Role.MONITOR, Role.OPERATOR},
    ("GET", "/v2/models/scaling/stats"): {Role.MONITOR, Role.OPERATOR},
    ("GET", "/metrics"): {Role.MONITOR, Role.OPERATOR},
}


@pytest.mark.parametrize("role", [*Role, None])
def test_each_path_answers_its_roles_alone(role, guarded):
    """Health to everyone; else 401 without a key, and 403 with one of another role."""
    headers = {"authorization": f"Bearer {guarded.keys[role]}"} if role else {}
    with httpx.Client(base_url=guarded.http, headers=headers) as client:
        for (method, path), roles in PATHS.items():
            content = GOOD if path.endswith("/infer") else b""
            status = client.request(method, path, content=content).status_code
            assert status == (200 if role in roles else 403 if role else 401), (method, path)


METHODS = {
    "ServerLive": (pb.ServerLiveRequest(), set(Role) | {None}),
    "ServerReady": (pb.ServerReadyRequest(), set(Role) | {None}),
    "ServerMetadata": (pb.ServerMetadataRequest(), {Role.CALLER, Role.OPERATOR}),
    "ModelReady": (pb.ModelReadyRequest(name="scaling"), {Role.CALLER, Role.OPERATOR}),
    "ModelMetadata": (pb.ModelMetadataRequest(name="scaling"), {Role.CALLER, Role.OPERATOR}),
    "RepositoryIndex": (pb.RepositoryIndexRequest(), {Role.CALLER, Role.OPERATOR}),
    "ModelStatistics": (pb.ModelStatisticsRequest(), {Role.MONITOR, Role.OPERATOR}),
    "RepositoryModelLoad": (
        pb.RepositoryModelLoadRequest(model_name="scaling"),
        {Role.OPERATOR},
    ),
}


@pytest.mark.parametrize("role", [*Role, None])
def test_each_method_answers_its_roles_alone(role, guarded):
    """Over gRPC the same: UNAUTHENTICATED without a key, PERMISSION_DENIED with another role."""
    metadata = [("authorization", f"Bearer {guarded.keys[role]}")] if role else []
    refusal = grpc.StatusCode.PERMISSION_DENIED if role else grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(guarded.grpc.removeprefix("grpc://")) as channel:
        for method, (request, roles) in METHODS.items():
            call = channel.unary_unary(SERVICE + method)
            try:
                call(request.SerializeToString(), metadata=metadata, timeout=10)
                status = grpc.StatusCode.OK
            except grpc.RpcError as error:
                status = error.code()
            assert status == (grpc.StatusCode.OK if role in roles else refusal), method


def test_strangers_messages_are_not_received(guarded):
    """Over gRPC a stranger is refused before its message has come, however long that is."""
    with grpc.insecure_channel(guarded.grpc.removeprefix("grpc://")) as channel:
        call = channel.unary_unary(SERVICE + "ModelInfer")
        with pytest.raises(grpc.RpcError) as refused:
            call(bytes(64 * 2**20), timeout=10)  # twice what a message may have
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_key_has_its_rate_and_not_another(guarded):
    """Past its burst 429 with Retry-After, RESOURCE_EXHAUSTED; other keys are not touched."""
    key, _ = guarded.store.create("limited", requests_per_s=0.05, burst=4)
    with httpx.Client(base_url=guarded.http, headers={"authorization": f"Bearer {key}"}) as client:
        deadline = dt.datetime.now() + dt.timedelta(seconds=10)
        while client.get("/v2/models").status_code == 401:  # until the server looks at the file
            assert dt.datetime.now() < deadline
        with GrpcClient(guarded.grpc, credentials=Credentials(key=key)) as rpc:
            rpc.infer("scaling", {"input": ROWS})
            client.post("/v2/models/scaling/infer", content=GOOD).raise_for_status()
            client.get("/v2/models").raise_for_status()
            with pytest.raises(RejectedError, match=r"0\.05 requests a second") as refused:
                rpc.infer("scaling", {"input": ROWS})
        assert refused.value.status == 429
        response = client.post("/v2/models/scaling/infer", content=GOOD)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 20
        assert client.get("/v2/health/live").status_code == 200
    metadata = [("authorization", f"Bearer {key}")]
    with (
        grpc.insecure_channel(guarded.grpc.removeprefix("grpc://")) as channel,
        pytest.raises(grpc.RpcError) as error,
    ):
        channel.unary_unary(SERVICE + "ServerMetadata")(b"", metadata=metadata, timeout=10)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 1 <= int(dict(error.value.trailing_metadata())["retry-after"]) <= 20
    assert all(answers(one) for one in guarded.clients(guarded.keys[Role.CALLER]))


def test_the_description_tells_that_keys_are_wanted(guarded):
    """A protected server's OpenAPI description has the scheme, and 401 where a key is wanted."""
    headers = {"authorization": f"Bearer {guarded.keys[Role.CALLER]}"}
    found = httpx.get(f"{guarded.http}/openapi.json", headers=headers).json()
    assert found["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    paths = found["paths"]
    assert paths["/v2/models"]["get"]["security"] == [{"key": []}]
    assert "401" in paths["/v2/models"]["get"]["responses"]
    assert "security" not in paths["/v2/health/live"]["get"]


def test_open_metrics_need_no_key(tmp_path):
    """As configured, metrics are open, and nothing else with them."""
    KeyStore(tmp_path / "keys.json").create("shop")
    protection = Protection(keys=str(tmp_path / "keys.json"), open_metrics=True)
    with place(tmp_path, protection) as (http, _):
        assert httpx.get(f"{http}/metrics").status_code == 200
        assert httpx.get(f"{http}/v2/models/stats").status_code == 401


def test_tls_on_both_wires(encrypted, pem):
    """Clients that trust the authority are answered; TLS 1.1 and plain requests are not."""
    assert encrypted.http.startswith("https://")
    assert encrypted.grpc.startswith("grpcs://")
    assert all(answers(client) for client in encrypted.clients(ca=pem.ca))
    host, port = encrypted.http.removeprefix("https://").split(":")
    old = ssl.create_default_context(cafile=pem.ca)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        pytest.raises(ssl.SSLError),
    ):
        old.wrap_socket(raw, server_hostname=host)
    with pytest.raises(httpx.TransportError):
        httpx.get(encrypted.http.replace("https", "http"))


def test_slow_handshakes_keep_nobody_out(encrypted, pem):
    """Many who begin TLS and say no more, on both wires, do not delay those who go on."""
    ports = [int(url.rsplit(":", 1)[1]) for url in (encrypted.http, encrypted.grpc)]
    slow = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")
        began = time.monotonic()
        assert all(answers(client) for client in encrypted.clients(ca=pem.ca))
        assert time.monotonic() - began < 5
    finally:
        for connection in slow:
            connection.close()


def test_clients_refuse_servers_that_they_do_not_trust(encrypted):
    """Without the authority's certificate nothing is asked."""
    for client in encrypted.clients():
        with client, pytest.raises(ServerUnreachableError):
            client.infer("scaling", {"input": ROWS})


def test_a_client_certificate_does_for_a_key(certified, pem):
    """Mutual TLS: who shows a certificate of the authority asks without a key, and manages not."""
    files = {"ca": pem.ca, "certificate": pem.client, "certificate_key": pem.client_key}
    assert all(answers(client) for client in certified.clients(**files))
    context = Credentials(**files).context()
    with httpx.Client(base_url=certified.http, verify=context) as client:
        assert client.get("/metrics").status_code == 200
        assert client.post("/v2/repository/models/scaling/load").status_code == 403
        key = certified.keys[Role.OPERATOR]
        response = client.post(
            "/v2/repository/models/scaling/load", headers={"authorization": f"Bearer {key}"}
        )
        assert response.status_code == 200


def test_without_a_certificate_probes_and_keys_still_work_over_http(certified, pem):
    """A probe has no certificate; a key does for one over HTTP, gRPC wants one in any case."""
    context = Credentials(ca=pem.ca).context()
    with httpx.Client(base_url=certified.http, verify=context) as client:
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/v2/models").status_code == 401
        key = {"authorization": f"Bearer {certified.keys[Role.CALLER]}"}
        assert client.get("/v2/models", headers=key).status_code == 200
    shown = Credentials(ca=pem.ca, key=certified.keys[Role.CALLER])
    with (
        GrpcClient(certified.grpc, credentials=shown) as rpc,
        pytest.raises(ServerUnreachableError),
    ):
        rpc.infer("scaling", {"input": ROWS})


def test_a_certificate_of_another_authority_is_refused(certified, pem, tmp_path):
    """Over both wires, in the handshake."""
    _, _, stranger = issue(tmp_path, "stranger")
    certificate, key, _ = issue(tmp_path, "client", stranger)
    files = {"ca": pem.ca, "certificate": certificate, "certificate_key": key}
    for client in certified.clients(**files):
        with client, pytest.raises(ServerUnreachableError):
            client.infer("scaling", {"input": ROWS})


def test_keys_are_in_no_log_and_no_error(guarded, caplog, capfd, monkeypatch):
    """Whatever is logged, by anyone, at any level, and whatever fails: no key's secret is in it."""
    caplog.set_level(logging.DEBUG)
    right = guarded.keys[Role.CALLER]
    wrong = right[:-4] + "AAAA"
    said = []
    for key in (right, wrong):
        for client in guarded.clients(key):
            said.append(repr(client))
            with client:
                with contextlib.suppress(ClientError):
                    client.infer("scaling", {"input": ROWS})
                with pytest.raises(ClientError) as error:
                    client.infer("unknown\n", {"input": ROWS})
            said.append(str(error.value))
        with httpx.Client(headers={"authorization": f"Bearer {key}"}) as client:
            for path in ("/v2/models/unknown", "/metrics"):
                said.append(client.get(guarded.http + path).text)
        said.append(repr(Credentials(key=key)))
        with pytest.raises(ClientError) as error:
            InferenceClient("http://models.example", credentials=Credentials(key=key))
        said.append(str(error.value))
    monkeypatch.setenv("MINGA_API_KEY", right)
    said.append(repr(Credentials.from_environment()))
    text = "\n".join([caplog.text, *said, *capfd.readouterr()])
    assert caplog.records
    for key in (right, wrong):
        assert key.split("_", 2)[2][:-4] not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "models.example"])
def test_beyond_this_machine_callers_must_be_known(host, tmp_path, pem):
    """A server that would answer anyone does not start, unless it is told to."""
    with pytest.raises(AccessError, match="minga key create"):
        Protection().check(host)
    KeyStore(tmp_path / "keys.json").create("shop")
    tls = {"certificate": str(pem.server), "certificate_key": str(pem.server_key)}
    with pytest.raises(AccessError, match="minga key create"):
        Protection(**tls).check(host)
    Protection(keys=str(tmp_path / "keys.json")).check(host)
    Protection(**tls, client_ca=str(pem.ca)).check(host)
    Protection(allow_anonymous=True).check(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_this_machine_no_key_is_needed(host):
    """Loopback needs none."""
    Protection().check(host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"certificate_key": ""}, "both"),
        ({"certificate": "gone.pem"}, "No such file"),
        ({"certificate_key": "other"}, "cannot be set up"),
        ({"client_ca": "key"}, "cannot be set up"),
        ({"certificate": "", "certificate_key": "", "client_ca": "ca"}, "client CA needs TLS"),
        ({"keys": "gone.json"}, "cannot read the keys"),
    ],
    ids=["half", "gone", "mismatch", "no-ca", "ca-without-tls", "no-keys"],
)
def test_unusable_files_are_told_before_anything_starts(change, message, pem):
    """Each is one clear error."""
    files = {"other": str(pem.client_key), "key": str(pem.server_key), "ca": str(pem.ca)}
    usual = Protection(certificate=str(pem.server), certificate_key=str(pem.server_key))
    given = {name: files.get(value, value) for name, value in change.items()}
    with pytest.raises(AccessError, match=message):
        replace(usual, **given).check("127.0.0.1")


def test_predict_shows_its_key_from_a_file(guarded, tmp_path, capsys, monkeypatch):
    """`minga predict --key-file`, or MINGA_API_KEY; without a key exit code 24 and a remedy."""
    from minga.cli.app import main

    (tmp_path / "rows.json").write_text("[[1, 2, 3]]")
    (tmp_path / "key").write_text(guarded.keys[Role.CALLER] + "\n")
    words = ["predict", "scaling", "--input", str(tmp_path / "rows.json"), "--json", "--url"]

    def run(*more):
        with pytest.raises(SystemExit) as ending:
            main([*words, *more])
        return ending.value.code, capsys.readouterr()

    for url in (guarded.http, guarded.grpc):
        code, said = run(url, "--key-file", str(tmp_path / "key"))
        assert not code, said.err
        assert json.loads(said.out)["outputs"] == {"output": [[2, 4, 6]]}
    code, said = run(guarded.http)
    assert code == 24
    assert "API key" in said.err
    monkeypatch.setenv("MINGA_API_KEY", guarded.keys[Role.CALLER])
    code, _ = run(guarded.http)
    assert not code
