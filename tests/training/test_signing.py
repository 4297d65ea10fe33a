"""Signed statements: what is believed, and what is not."""

import base64
import contextlib
import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.training.errors import VerdictError
from minga.training.signing import Keyring, _encode

KIND = "application/vnd.minga.test+json"


def test_encoding_is_that_of_the_specification():
    """The bytes that are signed are those of DSSE's own example (protocol.md, "Test Vectors")."""
    assert _encode("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.binary(max_size=200))
def test_what_was_signed_comes_back(keyring, payload):
    """An envelope gives the payload that was put into it."""
    assert keyring.open_envelope(KIND, keyring.sign(KIND, payload)) == payload


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_refused(keyring, place, change):
    """Whatever byte of an envelope is changed, its payload is not given out altered."""
    payload = b'{"blessed": false}'
    envelope = bytearray(keyring.sign(KIND, payload).encode())
    envelope[place % len(envelope)] ^= change
    with contextlib.suppress(VerdictError):
        assert keyring.open_envelope(KIND, bytes(envelope)) == payload


def test_a_statement_of_another_kind_is_refused(keyring):
    """A promotion is not taken for a verdict, also if its type is rewritten."""
    envelope = keyring.sign(KIND, b"{}")
    with pytest.raises(VerdictError, match=r"is a 'application/vnd\.minga\.test"):
        keyring.open_envelope("application/other", envelope)
    renamed = json.dumps(json.loads(envelope) | {"payloadType": "application/other"})
    with pytest.raises(VerdictError, match="altered"):
        keyring.open_envelope("application/other", renamed)


def test_a_stranger_cannot_borrow_a_trusted_name(keyring, tmp_path):
    """A stranger's signature under a trusted key's id is refused."""
    stranger = Keyring.open(tmp_path / "stranger.pem")
    theirs, ours = (json.loads(one.sign(KIND, b"{}")) for one in (stranger, keyring))
    theirs["signatures"][0]["keyid"] = ours["signatures"][0]["keyid"]
    with pytest.raises(VerdictError, match="altered"):
        keyring.open_envelope(KIND, json.dumps(theirs))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"payload": 1}', '{"payload": "!"}', "null", "[" * 100_000],
    ids=range(7),
)
def test_garbage_is_refused_in_words(keyring, text):
    """What is no envelope at all is one kind of error."""
    with pytest.raises(VerdictError, match="cannot be read"):
        keyring.open_envelope(KIND, text)


def test_key_is_made_once_and_private(tmp_path):
    """The key is the same at the next start, and only its owner may read it."""
    file = tmp_path / "work" / "signing.pem"
    first, second = Keyring.open(file), Keyring.open(file)
    assert first.public_key == second.public_key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "PRIVATE" not in repr(first)
    assert "private" not in repr(first).lower()


@pytest.mark.parametrize("name", ["", "ed25519:", "ed25519:!", "rsa:AAAA", "ed25519:AAAA"])
def test_no_public_key_is_refused_in_words(tmp_path, name):
    """A trusted key that is none is named."""
    with pytest.raises(VerdictError, match="is no public key"):
        Keyring.open(tmp_path / "signing.pem", [name])


def test_file_that_is_no_key_is_refused(tmp_path):
    """A key file that holds something else is an error with its path, and stays as it is."""
    file = tmp_path / "signing.pem"
    file.write_text("secret")
    with pytest.raises(VerdictError, match="holds no private key"):
        Keyring.open(file)
    assert file.read_text() == "secret"


def test_envelope_is_what_other_tools_read(keyring):
    """The envelope has DSSE's fields, so that its verifiers take it."""
    envelope = json.loads(keyring.sign(KIND, b"{}"))
    assert envelope.keys() == {"payloadType", "payload", "signatures"}
    assert base64.b64decode(envelope["payload"]) == b"{}"
