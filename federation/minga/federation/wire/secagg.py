"""The messages of secure aggregation on the wire."""

from collections.abc import Iterable, Mapping

from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.v1 import federation_pb2 as pb


def advert_to_wire(round_id: str, advert: Advert) -> pb.KeyAdvert:
    """Write a key advert."""
    return pb.KeyAdvert(
        round_id=round_id,
        device_id=advert.device_id,
        mask_key=advert.mask_key,
        share_key=advert.share_key,
        self_seed_commitment=advert.self_seed_commitment,
        certificate=advert.certificate,
        signature=advert.signature,
    )


def advert_from_wire(advert: pb.KeyAdvert) -> Advert:
    """Read a key advert."""
    return Advert(
        device_id=advert.device_id,
        mask_key=advert.mask_key,
        share_key=advert.share_key,
        self_seed_commitment=advert.self_seed_commitment,
        certificate=advert.certificate,
        signature=advert.signature,
    )


def share_to_wire(share: EncryptedShare) -> pb.EncryptedShare:
    """Write an encrypted share."""
    return pb.EncryptedShare(
        sender=share.sender, receiver=share.receiver, ciphertext=share.ciphertext
    )


def share_from_wire(share: pb.EncryptedShare) -> EncryptedShare:
    """Read an encrypted share."""
    return EncryptedShare(sender=share.sender, receiver=share.receiver, ciphertext=share.ciphertext)


def shares_to_wire(round_id: str, shares: Iterable[EncryptedShare]) -> pb.SharesUpload:
    """Write all that a device shares."""
    return pb.SharesUpload(round_id=round_id, shares=[share_to_wire(share) for share in shares])


def confirmation_to_wire(round_id: str, confirmation: Confirmation) -> pb.SurvivorConfirmation:
    """Write a signature under the survivors."""
    return pb.SurvivorConfirmation(
        round_id=round_id,
        device_id=confirmation.device_id,
        signature=confirmation.signature,
    )


def confirmation_from_wire(confirmation: pb.SurvivorConfirmation) -> Confirmation:
    """Read a signature under the survivors."""
    return Confirmation(device_id=confirmation.device_id, signature=confirmation.signature)


def reveal_to_wire(round_id: str, reveal: Reveal) -> pb.ShareReveal:
    """Write a reveal."""
    return pb.ShareReveal(
        round_id=round_id,
        self_seed_shares=_revealed(reveal.self_seed_shares),
        mask_key_shares=_revealed(reveal.mask_key_shares),
    )


def _revealed(shares: Mapping[str, bytes]) -> list[pb.RevealedShare]:
    return [pb.RevealedShare(peer=peer, share=share) for peer, share in sorted(shares.items())]


def reveal_from_wire(device_id: str, reveal: pb.ShareReveal) -> Reveal:
    """Read a reveal."""
    return Reveal(
        device_id=device_id,
        self_seed_shares={share.peer: share.share for share in reveal.self_seed_shares},
        mask_key_shares={share.peer: share.share for share in reveal.mask_key_shares},
    )
