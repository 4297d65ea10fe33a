"""How a token and a signing request become a device: the decision, without sockets.

The steps are ordered so that a crash, or an answer that gets lost, between any two of them is
healed by asking again with the same token and the same key:

1. The request and the name are checked; nothing is written.
2. The token is redeemed for the request's key. Again by the same key: the same group again.
3. The device is registered under its name and key. Again with both the same: nothing happens.
4. A certificate is issued; it needs no record, since devices are refused by name.

Nothing here is logged but names: a token's secret never appears in a message.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

from minga.federation.certificates import digest_of_key
from minga.federation.coordinator.authority import Authority, public_key_of_request
from minga.federation.coordinator.tokens import TokenIssuer
from minga.federation.errors import EnrolmentError
from minga.federation.identity import Role, is_name

_log = logging.getLogger(__name__)


class RegisterDevice(Protocol):
    """Puts a device on record; durable when it returns."""

    def __call__(self, device_id: str, group: str, key_digest: bytes) -> None:
        """Register a device, or do nothing if this very device is registered.

        Name and key belong together from then on: the token's uses are counted by key, so a key
        with a second name would be a second device on one use.

        Args:
            device_id: The device's name.
            group: The group of its token.
            key_digest: SHA-256 of its public key, 32 bytes.

        Raises:
            EnrolmentError: the name has another key, the key has another name, or the device
                was revoked.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What a device gets: its name, its certificate with the intermediate, and the authority's."""

    device_id: str
    chain_der: bytes
    authority_der: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Enroller:
    """Lets devices into one federation."""

    authority: Authority
    tokens: TokenIssuer
    register_device: RegisterDevice

    def enrol(self, token_secret: bytes, device_name: str, csr: bytes) -> Enrolled:
        """Turn a token into a device's certificate.

        Args:
            token_secret: The secret of an enrolment token.
            device_name: The name that the device asks for.
            csr: PKCS#10 in DER, signed by the device's key.

        Raises:
            EnrolmentError: request, name or token are refused; nothing was changed unless the
                name is taken: then the token waits for the same key with another name.
        """
        if not is_name(device_name):
            raise EnrolmentError(
                f"device name {device_name[:80]!r} is not possible; use a-z, 0-9 and '-', "
                "beginning with a letter or digit, at most 63 characters"
            )
        key_digest = digest_of_key(public_key_of_request(csr))
        group = self.tokens.redeem(token_secret, key_digest)
        self.register_device(device_name, group, key_digest)
        certificate = self.authority.issue_client(Role.DEVICE, device_name, csr)
        _log.info("enrolled device %s in group %s", device_name, group)
        return Enrolled(
            device_id=device_name,
            chain_der=self.authority.chain_of(certificate),
            authority_der=self.authority.pinned_der,
        )
