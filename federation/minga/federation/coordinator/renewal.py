"""How a device's certificate is replaced: the decision, without sockets.

The key stays. A device's name and key belong together from enrolment on, so a certificate can be
renewed for that key alone: nobody moves a name to a key of their own. On the device one file
changes, in one step, and nothing is left to heal after a power cut; a round that is under way goes
on with the key that signed its beginning; and a key in a secure element stays there. The price is
that a key which was copied unnoticed stays good until its device is revoked.

Who may ask is settled before (`access`): the holder of a certificate that is valid at this moment
and not revoked. Nothing is stored but the audit entry; asking again gives another certificate.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509

from minga.federation.certificates import digest_of_key
from minga.federation.coordinator.authority import Authority, public_key_of_request
from minga.federation.errors import EnrolmentError
from minga.federation.identity import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewer:
    """Renews the certificates of one federation's devices.

    Attributes:
        authority: Who issues.
        key_on_record: Gives SHA-256 of the public key that a device enrolled with, 32 bytes.
    """

    authority: Authority
    key_on_record: Callable[[str], bytes | None]

    def renew(self, device_id: str, csr: bytes) -> x509.Certificate:
        """Issue a new certificate for a device.

        Args:
            device_id: The device, as its present certificate names it.
            csr: PKCS#10 in DER, signed by the key that the device enrolled with.

        Raises:
            EnrolmentError: the request is damaged, or for another key.
        """
        if digest_of_key(public_key_of_request(csr)) != self.key_on_record(device_id):
            raise EnrolmentError(
                f"the request is for another key than device {device_id!r} enrolled with; "
                "ask with that key, or enrol the new one under another name"
            )
        return self.authority.issue_client(Role.DEVICE, device_id, csr)
