"""What is signed, and the two seams to whoever signs and checks.

`minga.federation.identity` has both for X.509 certificates.
"""

from collections.abc import Iterable
from typing import Protocol

from minga.federation.errors import FederationError
from minga.federation.secagg.encoding import encode
from minga.federation.secagg.errors import SignatureError
from minga.federation.secagg.messages import Advert, Confirmation
from minga.federation.secagg.plan import RoundPlan


class Identity(Protocol):
    """A device's name and its signing key."""

    @property
    def device_id(self) -> str:
        """The device's name in the federation."""
        ...

    @property
    def certificate_der(self) -> bytes:
        """What a verifier needs to check this device's signatures."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Sign with the device's long-lived key."""
        ...


class Verifier(Protocol):
    """Knows which devices belong to the federation."""

    def verify(self, device_id: str, certificate: bytes, signature: bytes, message: bytes) -> None:
        """Check that this device signed this message.

        Raises:
            FederationError: it did not, or its certificate does not hold.
        """
        ...


def sign_advert(
    plan: RoundPlan, identity: Identity, mask_key: bytes, share_key: bytes, commitment: bytes
) -> Advert:
    """Make a device's advert. The signature binds the plan: it is worthless in another round."""
    message = _advert_message(plan, identity.device_id, mask_key, share_key, commitment)
    return Advert(
        device_id=identity.device_id,
        mask_key=mask_key,
        share_key=share_key,
        self_seed_commitment=commitment,
        certificate=identity.certificate_der,
        signature=identity.sign(message),
    )


def check_advert(plan: RoundPlan, verifier: Verifier, advert: Advert) -> None:
    """Refuse an advert that its device did not sign for this very plan.

    Raises:
        SignatureError: forged, unsigned, or of another round.
    """
    message = _advert_message(
        plan, advert.device_id, advert.mask_key, advert.share_key, advert.self_seed_commitment
    )
    _check(verifier, advert, advert.signature, message, "key advert")


def sign_survivors(plan: RoundPlan, identity: Identity, survivors: Iterable[str]) -> Confirmation:
    """Make a device's confirmation of a list of survivors."""
    message = _survivors_message(plan, identity.device_id, survivors)
    return Confirmation(device_id=identity.device_id, signature=identity.sign(message))


def check_confirmation(
    plan: RoundPlan,
    verifier: Verifier,
    advert: Advert,
    survivors: Iterable[str],
    confirmation: Confirmation,
) -> None:
    """Refuse a confirmation that its device did not sign for this very list.

    Args:
        plan: The round's numbers.
        verifier: Who belongs to the federation.
        advert: The device's own advert, already checked: it brings the certificate.
        survivors: The list.
        confirmation: What the device sent.

    Raises:
        SignatureError: forged, or of another list or round.
    """
    message = _survivors_message(plan, confirmation.device_id, survivors)
    _check(verifier, advert, confirmation.signature, message, "confirmation of the survivors")


def _check(verifier: Verifier, advert: Advert, signature: bytes, message: bytes, what: str) -> None:
    try:
        verifier.verify(advert.device_id, advert.certificate, signature, message)
    except FederationError as error:
        raise SignatureError(
            f"the {what} of {advert.device_id} is not signed by it for this round: {error}",
            [advert.device_id],
        ) from error


def _advert_message(
    plan: RoundPlan, device_id: str, mask_key: bytes, share_key: bytes, commitment: bytes
) -> bytes:
    return encode("advert", plan.digest, device_id, mask_key, share_key, commitment)


def _survivors_message(plan: RoundPlan, device_id: str, survivors: Iterable[str]) -> bytes:
    return encode("survivors", plan.digest, device_id, *sorted(survivors))
