"""Keys between two devices, and the secrets that go from one to the other.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-GCM. The HKDF info of every key is
`minga secagg v1 | purpose | plan digest | the two devices with their public keys`, so a key serves
one purpose, one round and one pair. Pairwise masks name the pair in the order of the ids, so both
ends get the same key; share encryption names it sender first, so each direction has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from minga.federation.secagg.encoding import encode
from minga.federation.secagg.errors import MessageError, ShareError
from minga.federation.secagg.masking import MASK_KEY_BYTES, Mask
from minga.federation.secagg.messages import KEY_BYTES, NONCE_BYTES, Advert, EncryptedShare
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.shamir import PRIME, SHARE_BYTES, is_share


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """An X25519 key pair of one round, and what it agreed on; all of it goes with the pair."""

    secret: bytes = field(repr=False)
    public: bytes
    _private: X25519PrivateKey = field(repr=False)
    _agreed: dict[bytes, bytes] = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_secret(cls, secret: bytes) -> Self:
        """Complete a pair from its 32 secret bytes."""
        private = X25519PrivateKey.from_private_bytes(secret)
        public = private.public_key().public_bytes_raw()
        return cls(secret=secret, public=public, _private=private)

    def exchange(self, peer_key: bytes, peer_id: str) -> bytes:
        """Agree on 32 bytes with the holder of a public key (X25519).

        Raises:
            MessageError: the key has a small order, which would make the result public.
        """
        agreed = self._agreed.get(peer_key)
        if agreed is None:
            try:
                agreed = self._private.exchange(X25519PublicKey.from_public_bytes(peer_key))
            except ValueError as error:  # the result is all zeros: RFC 7748, section 6.1
                raise MessageError(
                    f"{peer_id} advertised a key of small order", [peer_id]
                ) from error
            self._agreed[peer_key] = agreed
        return agreed


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerShares:
    """What one device holds of another one's secrets."""

    self_seed: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)


def generate(random_bytes: Callable[[int], bytes]) -> KeyPair:
    """Make a key pair."""
    return KeyPair.from_secret(random_bytes(KEY_BYTES))


def commit_seed(plan: RoundPlan, device_id: str, seed: bytes) -> bytes:
    """Commit to a self-mask seed; its 256 random bits hide it without further salt."""
    return sha256(encode("seed commitment", plan.digest, device_id, seed)).digest()


def self_mask(plan: RoundPlan, device_id: str, seed: bytes) -> Mask:
    """Make the mask that a device adds to protect its own late update."""
    info = encode("self mask", plan.digest, device_id)
    return Mask(key=derive(seed, info, MASK_KEY_BYTES), sign=1)


def pair_mask(plan: RoundPlan, pair: KeyPair, own: Advert, peer: Advert) -> Mask:
    """Make the mask between two devices, as `own` applies it: the peer's is the inverse.

    Args:
        plan: The round's numbers.
        pair: That of `own.mask_key`.
        own: The advert of the device that applies the mask.
        peer: The advert of the other one.

    Raises:
        MessageError: the peer's key has a small order (RFC 7748, section 6.1).
    """
    first, second = sorted((own, peer), key=lambda advert: advert.device_id)
    info = encode(
        "pair mask",
        plan.digest,
        first.device_id,
        first.mask_key,
        second.device_id,
        second.mask_key,
    )
    shared = pair.exchange(peer.mask_key, peer.device_id)
    return Mask(key=derive(shared, info, MASK_KEY_BYTES), sign=1 if own is first else -1)


@lru_cache(maxsize=1 << 14)
def share_place(device_id: str) -> int:
    """Say where in the field a device's shares are taken, in every round and graph."""
    return int.from_bytes(sha256(encode("share place", device_id)).digest()) % PRIME


def seal_shares(
    plan: RoundPlan,
    pair: KeyPair,
    own: Advert,
    peer: Advert,
    *,
    shares: PeerShares,
    random_bytes: Callable[[int], bytes],
) -> EncryptedShare:
    """Encrypt a device's shares for one neighbour.

    Args:
        plan: The round's numbers.
        pair: That of `own.share_key`.
        own: The sender's advert.
        peer: The receiver's advert.
        shares: One share of each of the sender's secrets.
        random_bytes: Source of randomness.

    Raises:
        MessageError: the peer's key has a small order.
    """
    info = _channel(plan, own, peer)
    cipher = AESGCM(derive(pair.exchange(peer.share_key, peer.device_id), info, 32))
    nonce = random_bytes(NONCE_BYTES)
    plain = shares.self_seed + shares.mask_key
    return EncryptedShare(
        sender=own.device_id,
        receiver=peer.device_id,
        ciphertext=nonce + cipher.encrypt(nonce, plain, info),
    )


def open_shares(
    plan: RoundPlan, pair: KeyPair, own: Advert, peer: Advert, message: EncryptedShare
) -> PeerShares:
    """Decrypt what a neighbour sealed for this device.

    Args:
        plan: The round's numbers.
        pair: That of `own.share_key`.
        own: The receiver's advert.
        peer: The sender's advert.
        message: What arrived.

    Raises:
        MessageError: the peer's key has a small order.
        ShareError: the bytes were not sealed by that sender for this receiver and round.
    """
    info = _channel(plan, peer, own)
    cipher = AESGCM(derive(pair.exchange(peer.share_key, peer.device_id), info, 32))
    nonce, sealed = message.ciphertext[:NONCE_BYTES], message.ciphertext[NONCE_BYTES:]
    try:
        plain = cipher.decrypt(nonce, sealed, info)
    except InvalidTag as error:
        raise ShareError(
            f"the shares from {peer.device_id} for {own.device_id} were tampered with",
            [peer.device_id],
        ) from error
    shares = PeerShares(self_seed=plain[:SHARE_BYTES], mask_key=plain[SHARE_BYTES:])
    if not (is_share(shares.self_seed) and is_share(shares.mask_key)):
        raise ShareError(
            f"{peer.device_id} sent {own.device_id} bytes that are no shares", [peer.device_id]
        )
    return shares


def _channel(plan: RoundPlan, sender: Advert, receiver: Advert) -> bytes:
    """Name one direction between two devices: HKDF info, and what the AEAD authenticates."""
    return encode(
        "shares",
        plan.digest,
        sender.device_id,
        sender.share_key,
        receiver.device_id,
        receiver.share_key,
    )


def derive(secret: bytes, info: bytes, length: int) -> bytes:
    """Derive a key for one purpose (HKDF-SHA256 without salt: the secrets are uniform enough)."""
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(secret)
