"""Keys between devices."""

from dataclasses import replace

import pytest

from minga.federation.secagg import agreement
from minga.federation.secagg.agreement import KeyPair, PeerShares
from minga.federation.secagg.errors import MessageError, ShareError
from minga.federation.secagg.messages import Advert
from minga.federation.secagg.shamir import PRIME

from .simulator import make_plan, names, seeded_bytes

PLAN = make_plan()
OTHER_PLAN = replace(PLAN, round_id=b"other round id..")
SHARES = PeerShares(self_seed=bytes(32) + b"\1", mask_key=bytes(32) + b"\2")


class Party:
    """A device's two key pairs and its advert."""

    def __init__(self, device_id: str) -> None:
        draw = seeded_bytes(device_id)
        self.mask, self.share = agreement.generate(draw), agreement.generate(draw)
        self.advert = Advert(
            device_id=device_id,
            mask_key=self.mask.public,
            share_key=self.share.public,
            self_seed_commitment=bytes(32),
            certificate=b"",
            signature=b"",
        )


ALICE, BOB, CAROL = (Party(name) for name in ("alice", "bob", "carol"))


def seal(sender: Party = ALICE, receiver: Party = BOB, plan=PLAN):
    return agreement.seal_shares(
        plan,
        sender.share,
        sender.advert,
        receiver.advert,
        shares=SHARES,
        random_bytes=seeded_bytes(0),
    )


def test_x25519():
    """Key pairs and agreement are those of RFC 7748, section 6.1."""
    alice = KeyPair.from_secret(
        bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = KeyPair.from_secret(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert alice.exchange(bob.public, "bob").hex() == shared
    assert bob.exchange(alice.public, "alice").hex() == shared


def test_hkdf():
    """Derivation is HKDF-SHA256: RFC 5869, test case 3 (no salt, no info)."""
    assert agreement.derive(b"\x0b" * 22, b"", 42) == bytes.fromhex(
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


@pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31)])
def test_keys_of_small_order_are_refused(key: bytes):
    """A key that would make the agreed secret public is its sender's fault."""
    with pytest.raises(MessageError, match="small order") as caught:
        ALICE.mask.exchange(key, "mallory")
    assert caught.value.blamed == ("mallory",)


def test_both_ends_get_one_mask_and_its_inverse():
    """Two devices agree on a key; what one adds the other takes off."""
    one = agreement.pair_mask(PLAN, ALICE.mask, ALICE.advert, BOB.advert)
    other = agreement.pair_mask(PLAN, BOB.mask, BOB.advert, ALICE.advert)
    assert one == other.inverse()
    assert one.sign == 1
    assert len(one.key) == 16


def test_every_pair_round_and_purpose_has_its_own_key():
    """No key serves twice, whatever the keys of the round are."""
    keys = [
        agreement.pair_mask(plan, ALICE.mask, ALICE.advert, peer).key
        for plan in (PLAN, OTHER_PLAN)
        for peer in (BOB.advert, CAROL.advert)
    ]
    renamed = replace(BOB.advert, device_id="robert")
    keys.append(agreement.pair_mask(PLAN, ALICE.mask, ALICE.advert, renamed).key)
    keys += [agreement.self_mask(PLAN, name, bytes(32)).key for name in ("alice", "bob")]
    keys.append(agreement.self_mask(OTHER_PLAN, "alice", bytes(32)).key)
    assert len(set(keys)) == 8


def test_seed_commitment_binds_owner_round_and_seed():
    """A commitment opens for one seed of one device in one round."""
    commitments = {
        agreement.commit_seed(plan, name, seed)
        for plan in (PLAN, OTHER_PLAN)
        for name in ("alice", "bob")
        for seed in (bytes(32), b"s" * 32)
    }
    assert len(commitments) == 8


def test_shares_arrive():
    """What one device seals for another, that one opens."""
    opened = agreement.open_shares(PLAN, BOB.share, BOB.advert, ALICE.advert, seal())
    assert opened == SHARES


@pytest.mark.parametrize("place", [0, 11, 12, 50, 93])
def test_tampered_shares_are_noticed(place: int):
    """A flipped bit anywhere, nonce and tag included, spoils the message."""
    message = seal()
    spoilt = bytearray(message.ciphertext)
    spoilt[place] ^= 1
    message = replace(message, ciphertext=bytes(spoilt))
    with pytest.raises(ShareError, match="tampered") as caught:
        agreement.open_shares(PLAN, BOB.share, BOB.advert, ALICE.advert, message)
    assert caught.value.blamed == ("alice",)


def test_shares_open_nowhere_else():
    """Another receiver, sender, round or direction does not open them."""
    message = seal()
    wrong = [
        (PLAN, CAROL, ALICE),
        (PLAN, BOB, CAROL),
        (OTHER_PLAN, BOB, ALICE),
        (PLAN, ALICE, BOB),
    ]
    for plan, own, peer in wrong:
        with pytest.raises(ShareError):
            agreement.open_shares(plan, own.share, own.advert, peer.advert, message)


def test_sealed_bytes_must_be_shares():
    """A sender that seals something else than field elements is found out."""
    false = PeerShares(self_seed=PRIME.to_bytes(33), mask_key=bytes(33))
    message = agreement.seal_shares(
        PLAN,
        ALICE.share,
        ALICE.advert,
        BOB.advert,
        shares=false,
        random_bytes=seeded_bytes(0),
    )
    with pytest.raises(ShareError, match="no shares"):
        agreement.open_shares(PLAN, BOB.share, BOB.advert, ALICE.advert, message)


def test_share_places_are_distinct_and_fixed():
    """A device's place in the field depends on its name alone, and no two share one."""
    places = {agreement.share_place(name) for name in names(100)}
    assert len(places) == 100
    assert all(0 < place < PRIME for place in places)


def test_nothing_secret_is_printed():
    """Key pairs and shares print without their secrets."""
    assert "secret" not in repr(ALICE.mask)
    assert repr(SHARES) == "PeerShares()"
