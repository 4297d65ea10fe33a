"""What travels in a round. Making a message checks its form; who may send it is checked elsewhere.

No message shows a secret when printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from minga.federation.secagg.errors import MessageError
from minga.federation.secagg.shamir import SHARE_BYTES, is_share

KEY_BYTES: Final = 32
COMMITMENT_BYTES: Final = sha256().digest_size
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
CIPHERTEXT_BYTES: Final = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """A device's two public keys for one round, and its commitment to its self-mask seed."""

    device_id: str
    mask_key: bytes
    """X25519: agrees on pairwise masks."""
    share_key: bytes
    """X25519: agrees on the keys that encrypt shares."""
    self_seed_commitment: bytes
    """Lets the coordinator tell a rightly rebuilt seed from a wrong one; hides it otherwise."""
    certificate: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_length("mask_key", self.mask_key, KEY_BYTES, self.device_id)
        _check_length("share_key", self.share_key, KEY_BYTES, self.device_id)
        _check_length(
            "self_seed_commitment", self.self_seed_commitment, COMMITMENT_BYTES, self.device_id
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptedShare:
    """One share of each of the sender's two secrets, readable by the receiver alone."""

    sender: str
    receiver: str
    ciphertext: bytes
    """Nonce, then AES-256-GCM of both shares."""

    def __post_init__(self) -> None:
        _check_length("ciphertext", self.ciphertext, CIPHERTEXT_BYTES, self.sender)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """A device's signature under the survivors that it was shown."""

    device_id: str
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reveal:
    """What a device gives for unmasking: of each peer a share of one secret, never of both.

    A peer whose shares could not be decrypted is left out.
    """

    device_id: str
    self_seed_shares: Mapping[str, bytes] = field(repr=False)
    """Survivor -> share of its self-mask seed."""
    mask_key_shares: Mapping[str, bytes] = field(repr=False)
    """Dropped device -> share of its private mask key."""

    def __post_init__(self) -> None:
        both = self.self_seed_shares.keys() & self.mask_key_shares.keys()
        if both:
            raise MessageError(
                f"{self.device_id} revealed both secrets of {sorted(both)}", [self.device_id]
            )
        for shares in (self.self_seed_shares, self.mask_key_shares):
            for peer, share in shares.items():
                if not is_share(share):
                    raise MessageError(
                        f"what {self.device_id} revealed of {peer} is no share",
                        [self.device_id],
                    )


def _check_length(name: str, value: bytes, expected: int, sender: str) -> None:
    if len(value) != expected:
        raise MessageError(
            f"{name} from {sender} has {len(value)} bytes, expected {expected}", [sender]
        )
