"""The coordinator's own certificates, each issued anew before it ends: no restart, no person.

`ServerCertificate` is what TLS shows on both ports. `OwnIdentity` is a folder in the state folder:
the operator's identity, for whoever may read it, and the one that signs the audit log.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from minga.federation import identity as identities
from minga.federation.certificates import digest_of_key, load_chain, renewal_time
from minga.federation.coordinator.authority import Authority
from minga.federation.identity import Identity, Role, ServerIdentity


class ServerCertificate:
    """The server's key and certificate.

    `current` may be called from any thread: it is what `transport` asks for at each handshake.

    Args:
        authority: Who issues.
        hosts: DNS names and IP addresses under which clients dial.
    """

    def __init__(self, authority: Authority, hosts: Sequence[str]) -> None:
        self._authority = authority
        self._hosts = tuple(hosts)
        self._issue()

    def current(self) -> ServerIdentity:
        """Give the newest key and certificate."""
        return self._server

    def valid_until(self) -> float:
        """Say when the newest certificate ends, in seconds since 1970."""
        return self._server.certificate.not_valid_after_utc.timestamp()

    def renew_if_due(self) -> bool:
        """Make another key and certificate if it is time; True if so."""
        now = self._authority.clock()
        if self._server.certificate.not_valid_before_utc <= now < self._due:
            return False
        self._issue()
        return True

    def _issue(self) -> None:
        self._server = self._authority.issue_server(self._hosts)
        self._due: datetime = renewal_time(self._server.certificate)


class OwnIdentity:
    """An identity that the coordinator issues to itself; its key stays, in the folder.

    It gets another key when it is revoked, and under another intermediate than before: that is
    replaced because somebody may have its key, and then has this one too.

    Args:
        authority: Who issues.
        folder: The identity folder; made if missing.
        role: What the holder is.
        name: Who the holder is.
    """

    def __init__(self, authority: Authority, folder: Path, role: Role, name: str) -> None:
        self._authority = authority
        self._folder = folder
        self._role = role
        self._name = name
        self._drop_key_of_another_issuer()
        self._key = identities.load_or_create_key(folder / identities.KEY_FILE)
        self._issue()

    def current(self) -> Identity:
        """Give the identity, with a certificate that is valid now."""
        self.renew_if_due()
        return self._identity

    @property
    def key_digest(self) -> bytes:
        """SHA-256 of its public key, 32 bytes: certificates for another one do not count."""
        return digest_of_key(self._key.public_key())

    def replace_key(self) -> None:
        """Make another key; copies of the folder from before count no more."""
        self._drop_key()
        self._key = identities.load_or_create_key(self._folder / identities.KEY_FILE)
        self._issue()

    def renew_if_due(self) -> bool:
        """Issue and write another certificate if it is time; True if so."""
        certificate = self._identity.certificate
        now = self._authority.clock()
        if certificate.not_valid_before_utc <= now < renewal_time(certificate):
            return False
        self._issue()
        return True

    def _issue(self) -> None:
        csr = identities.make_csr(self._key, self._name)
        certificate = self._authority.issue_client(self._role, self._name, csr)
        identity = self._authority.identity_of(self._key, certificate)
        identities.save_identity(self._folder, identity)
        self._identity = identity

    def _drop_key_of_another_issuer(self) -> None:
        if not identities.holds_identity(self._folder):
            return
        path = self._folder / identities.CERTIFICATE_FILE
        if load_chain(path)[1] != self._authority.intermediate:
            self._drop_key()

    def _drop_key(self) -> None:
        # The key goes first: were it the last, a crash in between would keep it.
        (self._folder / identities.KEY_FILE).unlink(missing_ok=True)
        (self._folder / identities.CERTIFICATE_FILE).unlink(missing_ok=True)
