"""The client: arrays in, arrays out, and errors that say what to do."""

import httpx
import numpy as np
import pytest

from minga.inference.client import InferenceClient
from minga.inference.errors import (
    BadRequestError,
    ClientError,
    RejectedError,
    ServerUnreachableError,
)

ROWS = np.array([[1, 2, 3]], np.float32)


@pytest.fixture
def client(make_app, models, serve):
    """A client of a real server with a model that doubles."""
    with serve(make_app(scaling=models["scaling"](2))) as url, InferenceClient(url) as client:
        yield client


@pytest.mark.parametrize("binary", [True, False])
def test_infer_gives_arrays_of_the_models_type(client, binary):
    """Raw and JSON transport give the same values and type."""
    outputs = client.infer("scaling", {"input": ROWS}, binary=binary)
    np.testing.assert_array_equal(outputs["output"], ROWS * 2)
    assert outputs["output"].dtype == np.float32


def test_a_version_and_outputs_can_be_named(client):
    """A request may name a version and the outputs it wants."""
    outputs = client.infer("scaling", {"input": ROWS}, version="1", outputs=["output"])
    assert list(outputs) == ["output"]
    with pytest.raises(RejectedError) as refusal:
        client.infer("scaling", {"input": ROWS}, version="9")
    assert refusal.value.status == 404


def test_metadata_and_readiness(client):
    """A model's metadata and readiness are one call each."""
    assert client.metadata("scaling")["inputs"][0]["shape"] == [-1, 3]
    assert client.models() == ("scaling",)
    assert client.ready()
    assert client.ready("scaling")
    assert not client.ready("unknown")


def test_the_servers_words_reach_the_caller(client):
    """A refusal keeps the server's message and status."""
    with pytest.raises(RejectedError, match=r"must have shape \[-1, 3\]") as refusal:
        client.infer("scaling", {"input": np.ones((1, 4), np.float32)})
    assert refusal.value.status == 400


def test_an_array_without_a_form_is_refused_before_it_is_sent(client):
    """What the protocol cannot carry never leaves the client."""
    with pytest.raises(BadRequestError, match="no datatype"):
        client.infer("scaling", {"input": np.ones(1, complex)})


def test_an_unreachable_server_is_one_clear_error():
    """Nobody there: the message names the URL and says what to check."""
    url = "http://127.0.0.1:1"
    with InferenceClient(url) as client:
        with pytest.raises(ServerUnreachableError, match="minga serve"):
            client.infer("scaling", {"input": ROWS})
        assert not client.ready()


@pytest.mark.parametrize("url", ["", "http://", "nothing", "ftp://127.0.0.1"])
def test_what_is_no_url_is_one_clear_error(url):
    """A URL that cannot be one is refused at once, with an example of one."""
    with pytest.raises(ClientError, match="write one like"):
        InferenceClient(url)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>welcome</html>"),
        httpx.Response(200, json={"outputs": []}),
        httpx.Response(200, headers={"inference-header-content-length": "x"}, json={}),
        httpx.Response(502, text="<html>bad gateway</html>"),
        httpx.Response(500, json=["error"]),
    ],
    ids=["page", "no-model", "bad-header", "gateway", "list"],
)
def test_a_server_of_another_kind_is_one_clear_error(answer):
    """Whatever else listens at the URL, the caller gets a client's error."""
    transport = httpx.MockTransport(lambda request: answer)
    client = InferenceClient("http://test", transport=transport)
    with client, pytest.raises(ClientError):
        client.infer("scaling", {"input": ROWS})
