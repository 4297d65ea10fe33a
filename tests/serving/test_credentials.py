"""What clients show, where they find it, and where they refuse to show it."""

from pathlib import Path

import pytest

from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.errors import ClientError
from minga.inference.grpc_client import GrpcClient


@pytest.mark.parametrize("url", ["http://models.example:80", "grpc://models.example:80"])
def test_clients_send_no_key_in_the_clear(url):
    """A key goes over TLS, or stays on this machine."""
    kind = GrpcClient if url.startswith("grpc") else InferenceClient
    with pytest.raises(ClientError, match="in the clear"):
        kind(url, credentials=Credentials(key="minga_x_y"))
    for shown in (Credentials(), Credentials(ca=None)):
        kind(url, credentials=shown).close()


@pytest.mark.parametrize("key", ["minga_\r\nX: y", "minga_\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_key_that_is_no_header_is_one_clear_error(key):
    """What was cut or pasted wrongly is told without being shown."""
    with pytest.raises(ClientError, match="characters") as error:
        InferenceClient("http://127.0.0.1:1", credentials=Credentials(key=key))
    assert "minga_" not in str(error.value)


def test_credentials_come_from_the_environment_or_a_file(tmp_path, monkeypatch):
    """The variable comes before the file; a file that cannot be read is one clear error."""
    file = tmp_path / "key"
    file.write_text("minga_from_file \nmore\n")
    monkeypatch.setenv("MINGA_API_KEY_FILE", str(file))
    monkeypatch.setenv("MINGA_API_CA", "ca.pem")
    assert Credentials.from_environment() == Credentials(key="minga_from_file", ca=Path("ca.pem"))
    monkeypatch.setenv("MINGA_API_KEY", " minga_from_variable\n")
    assert Credentials.from_environment().key == "minga_from_variable"
    monkeypatch.delenv("MINGA_API_KEY")
    file.unlink()
    with pytest.raises(ClientError, match="cannot read the API key"):
        Credentials.from_environment()
