"""What a device must have done before its answer is taken."""

from minga.federation.blobs import BlobStore
from minga.federation.coordinator.rounds import (
    DeviceEvent,
    KeysAdvertised,
    PlainUpdateUploaded,
    Round,
    SecureRound,
    SurvivorsConfirmed,
    UpdateUploaded,
)
from minga.federation.errors import PeerError
from minga.federation.secagg.coordinator import check_advert, check_confirmation
from minga.federation.secagg.signing import Verifier


def check_proof(round_: Round, event: DeviceEvent, verifier: Verifier, blobs: BlobStore) -> None:
    """Refuse what its device did not sign or upload, before it costs others their round.

    Raises:
        PeerError: the signature does not hold, or the update is not here.
    """
    match round_, event:
        case SecureRound(plan=plan), KeysAdvertised(advert=advert):
            check_advert(plan, verifier, advert)
        case SecureRound(plan=plan), SurvivorsConfirmed(device_id=device_id) as confirmed:
            signer, listed = round_.adverts.get(device_id), round_.survivors_with(device_id)
            if signer is not None:
                check_confirmation(plan, verifier, signer, listed, confirmed.confirmation)
        case _, UpdateUploaded(digest=digest, size=size) | PlainUpdateUploaded(
            digest=digest, size=size
        ):
            if not blobs.has(digest) or blobs.size(digest) != size:
                raise PeerError("the update that was announced is not uploaded")
        case _:
            pass
