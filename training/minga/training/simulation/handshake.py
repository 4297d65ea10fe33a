"""The messages of a secure round that carry its secrets, without any.

The coordinator's machine decides by who sent what, not by what is in it: who shares, whose update
counts, whether enough shares came to unmask. So it is given messages of the right shape, and the
sum is made of levels that were never masked.
"""

from collections.abc import Iterator, Sequence

from minga.federation.coordinator.rounds import (
    Event,
    KeysAdvertised,
    SecureRound,
    SharesRevealed,
    SharesSent,
    Stage,
    SurvivorsConfirmed,
)
from minga.federation.secagg.messages import (
    CIPHERTEXT_BYTES,
    COMMITMENT_BYTES,
    KEY_BYTES,
    Advert,
    Confirmation,
    EncryptedShare,
    Reveal,
)
from minga.federation.secagg.shamir import SHARE_BYTES

_SHARE = bytes(SHARE_BYTES)


def answers(round_: SecureRound, names: Sequence[str]) -> Iterator[Event]:
    """Give what devices answer in the stage that a round is in, but for their updates."""
    stage = round_.stage
    for name in names:
        match stage:
            case Stage.KEYS:
                yield KeysAdvertised(device_id=name, advert=_advert(name))
            case Stage.SHARES:
                shares = tuple(
                    EncryptedShare(sender=name, receiver=peer, ciphertext=bytes(CIPHERTEXT_BYTES))
                    for peer in round_.graph[name]
                )
                yield SharesSent(device_id=name, shares=shares)
            case Stage.CONFIRM:
                signed = Confirmation(device_id=name, signature=b"")
                yield SurvivorsConfirmed(device_id=name, confirmation=signed)
            case Stage.UNMASK:
                yield SharesRevealed(device_id=name, reveal=_reveal(round_, name))
            case _:
                raise AssertionError(f"stage {stage.name} has no handshake")


def _advert(name: str) -> Advert:
    return Advert(
        device_id=name,
        mask_key=bytes(KEY_BYTES),
        share_key=bytes(KEY_BYTES),
        self_seed_commitment=bytes(COMMITMENT_BYTES),
        certificate=b"",
        signature=b"",
    )


def _reveal(round_: SecureRound, name: str) -> Reveal:
    """Reveal what a device is asked for: a share of each peer's one secret."""
    peers = [peer for peer in round_.graph[name] if peer in round_.shares]
    return Reveal(
        device_id=name,
        self_seed_shares={peer: _SHARE for peer in peers if peer in round_.updates},
        mask_key_shares={peer: _SHARE for peer in peers if peer not in round_.updates},
    )
