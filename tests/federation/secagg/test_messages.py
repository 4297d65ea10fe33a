"""The form of messages."""

from dataclasses import replace

import pytest

from minga.federation.errors import FederationError, PeerError
from minga.federation.secagg import errors
from minga.federation.secagg.device import Step
from minga.federation.secagg.encoding import encode
from minga.federation.secagg.errors import MessageError
from minga.federation.secagg.messages import EncryptedShare, Reveal

from .simulator import Simulation

SHARE = bytes(33)


@pytest.mark.parametrize("name", ["mask_key", "share_key", "self_seed_commitment"])
@pytest.mark.parametrize("length", [0, 31, 33])
def test_adverts_have_32_byte_fields(name: str, length: int):
    """A key or commitment of another length is refused where it enters."""
    advert = Simulation().until(Step.ADVERTISE).adverts["device-00"]
    with pytest.raises(MessageError, match=f"{name} from device-00 has {length} bytes") as caught:
        replace(advert, **{name: bytes(length)})
    assert caught.value.blamed == ("device-00",)


def test_ciphertexts_have_one_length():
    """Shares are all of one size, so their ciphertext is, too."""
    with pytest.raises(MessageError, match="expected 94"):
        EncryptedShare(sender="a", receiver="b", ciphertext=bytes(93))


def test_a_reveal_cannot_hold_both_secrets_of_a_peer():
    """There is no message in which a device gives away both secrets of a peer."""
    with pytest.raises(MessageError, match=r"both secrets of \['b'\]"):
        Reveal(device_id="a", self_seed_shares={"b": SHARE}, mask_key_shares={"b": SHARE})


@pytest.mark.parametrize("share", [b"", bytes(32), b"\xff" * 33])
def test_revealed_shares_are_field_elements(share: bytes):
    """Bytes that are no share are refused where they enter."""
    with pytest.raises(MessageError, match="revealed of b is no share"):
        Reveal(device_id="a", self_seed_shares={}, mask_key_shares={"b": share})


def test_a_reveal_prints_without_shares():
    """A logged reveal gives nothing away."""
    reveal = Reveal(device_id="a", self_seed_shares={"b": SHARE}, mask_key_shares={})
    assert repr(reveal) == "Reveal(device_id='a')"


def test_encodings_are_unambiguous():
    """Fields that run together, or differ in type or purpose alone, have different bytes."""
    encodings = [
        encode("p", "ab", "c"),
        encode("p", "a", "bc"),
        encode("p", "abc"),
        encode("p", b"ab", "c"),
        encode("q", "ab", "c"),
        encode("p", "ab", "c", ""),
        encode("p", 1),
        encode("p", "1"),
        encode("p", True),
        encode("p", 1.0),
        encode("p", -1),
    ]
    assert len(set(encodings)) == len(encodings)


def test_hostile_input_and_our_own_mistakes_are_apart():
    """Peers' misdeeds are PeerErrors; order errors and wrong input of our own are not."""
    hostile = {
        errors.MessageError,
        errors.SignatureError,
        errors.EquivocationError,
        errors.ShareError,
        errors.SumError,
    }
    own = {errors.StateError, errors.PlanError, errors.UpdateError, errors.QuorumError}
    assert all(issubclass(error, PeerError) for error in hostile)
    assert all(issubclass(error, FederationError) for error in hostile | own)
    assert not any(issubclass(error, PeerError) for error in own)
