"""The federation's own certificate authority.

State: a folder with `authority.key.pem` (0600) and `authority.pem`, made on first use and read
from then on. Both are created exclusively and the key comes first, so that a crash in between, or
two processes that start at once, still end with one key and one certificate. A folder with a
`root.pem` beside them belongs to an offline root: the two are then an intermediate of it, and come
there as `coordinator.intermediate` says.

What is issued takes from a signing request nothing but the public key, after its signature proved
that the requester holds the private one. Names come from the caller, who knows what the token or
the operator allowed. Certificates start five minutes back, for clocks that are late.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from minga.federation import durable
from minga.federation.certificates import (
    chain_to_der,
    chain_to_pem,
    is_trust_domain,
    load_certificate,
    trust_domain_of,
)
from minga.federation.coordinator import intermediate as intermediates
from minga.federation.coordinator.intermediate import CERTIFICATE_FILE, KEY_FILE, ROOT_FILE
from minga.federation.errors import EnrolmentError, IdentityError
from minga.federation.identity import (
    Clock,
    Identity,
    Role,
    ServerIdentity,
    key_to_pem,
    load_or_create_key,
    new_key,
    spiffe_uri,
    utc_now,
)
from minga.federation.limits import MAX_REQUEST_BYTES

AUTHORITY_FOLDER: Final = "authority"
"""Its place in the coordinator's state folder."""

DEFAULT_TRUST_DOMAIN: Final = "minga"

AUTHORITY_LIFETIME: Final = timedelta(days=3650)
BACKDATING: Final = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long certificates hold."""

    device: timedelta = timedelta(days=30)
    operator: timedelta = timedelta(days=30)
    server: timedelta = timedelta(days=90)

    def of(self, role: Role) -> timedelta:
        """Give the lifetime of a client's certificate; services are renewed with the operator."""
        return self.device if role is Role.DEVICE else self.operator


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """Issues the certificates of one federation.

    Attributes:
        certificate: The one whose key issues.
        key: That key.
        root: The offline root whose intermediate `certificate` is; None: there is no other
            authority, and devices pin `certificate`.
        lifetimes: How long issued certificates hold.
        clock: The time to issue by.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    root: x509.Certificate | None = None
    lifetimes: Lifetimes = Lifetimes()
    clock: Clock = utc_now

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        trust_domain: str = DEFAULT_TRUST_DOMAIN,
        lifetimes: Lifetimes | None = None,
        clock: Clock = utc_now,
    ) -> Self:
        """Read the authority in a folder, or make it there.

        Args:
            folder: Where key and certificate are kept; made if missing.
            trust_domain: Named in all certificates; has effect on first use only, and none under
                an offline root.
            lifetimes: How long issued certificates hold.
            clock: The time to issue by.

        Raises:
            IdentityError: the files are damaged or do not belong together, or an offline root has
                not signed yet, or its intermediate has ended.
            ValueError: the trust domain has other characters than a host name.
        """
        lifetimes = lifetimes or Lifetimes()
        if (folder / ROOT_FILE).exists():
            root, certificate, key = intermediates.load(folder, clock())
            return cls(
                certificate=certificate, key=key, root=root, lifetimes=lifetimes, clock=clock
            )
        key = load_or_create_key(folder / KEY_FILE)
        path = folder / CERTIFICATE_FILE
        if not path.exists():
            certificate = self_signed(key, trust_domain, clock())
            # If another process is faster, its certificate is the one.
            with suppress(FileExistsError):
                durable.create_file(path, certificate.public_bytes(serialization.Encoding.PEM))
        certificate = load_certificate(path)
        if certificate.public_key() != key.public_key():
            raise IdentityError(f"{path} does not belong to {folder / KEY_FILE}; restore the pair")
        trust_domain_of(certificate)
        return cls(certificate=certificate, key=key, lifetimes=lifetimes, clock=clock)

    @property
    def pinned(self) -> x509.Certificate:
        """The certificate that devices trust from enrolment on."""
        return self.root or self.certificate

    @property
    def intermediate(self) -> x509.Certificate | None:
        """What issues in the offline root's name; None without one."""
        return None if self.root is None else self.certificate

    @property
    def pinned_der(self) -> bytes:
        """The pinned certificate as tokens carry it."""
        return self.pinned.public_bytes(serialization.Encoding.DER)

    @property
    def intermediate_der(self) -> bytes:
        """The intermediate as tokens carry it; empty without one."""
        return (
            b"" if self.root is None else self.certificate.public_bytes(serialization.Encoding.DER)
        )

    def chain_of(self, leaf: x509.Certificate) -> bytes:
        """Give an issued certificate as it goes over the wire: with its intermediate, DER."""
        return chain_to_der(leaf, self.intermediate)

    def identity_of(
        self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> Identity:
        """Put an issued certificate and its key together with what they hang by."""
        return Identity.of(key, certificate, self.pinned, self.intermediate)

    def issue_client(self, role: Role, name: str, csr: bytes) -> x509.Certificate:
        """Issue a client certificate for the key of a signing request.

        Args:
            role: What the holder is.
            name: Who the holder is, as `is_name` allows.
            csr: PKCS#10 in DER; only its public key is used.

        Raises:
            EnrolmentError: the request is damaged, not signed by its key, or the key not P-256.
        """
        public_key = public_key_of_request(csr)
        uri = spiffe_uri(trust_domain_of(self.certificate), role, name)
        return self._issue(
            public_key,
            name,
            self.lifetimes.of(role),
            [x509.UniformResourceIdentifier(uri)],
            ExtendedKeyUsageOID.CLIENT_AUTH,
        )

    def issue_server(self, hosts: Sequence[str]) -> ServerIdentity:
        """Make a key and a certificate for a server.

        Args:
            hosts: DNS names and IP addresses under which clients dial it, at least one.

        Raises:
            ValueError: there is no host, or one is not ASCII.
        """
        if not hosts:
            raise ValueError("a server certificate needs at least one host name or IP address")
        key = new_key()
        certificate = self._issue(
            key.public_key(),
            "coordinator",
            self.lifetimes.server,
            [_host(host) for host in hosts],
            ExtendedKeyUsageOID.SERVER_AUTH,
        )
        return ServerIdentity(
            key_pem=key_to_pem(key),
            certificate_pem=chain_to_pem(certificate, self.intermediate),
            authority_pem=self.pinned.public_bytes(serialization.Encoding.PEM),
        )

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        name: str,
        lifetime: timedelta,
        names: Iterable[x509.GeneralName],
        purpose: x509.ObjectIdentifier,
    ) -> x509.Certificate:
        now = self.clock()
        end = min(now + lifetime, self.certificate.not_valid_after_utc)
        return (
            _builder(common_name(name), public_key, x509.random_serial_number())
            .issuer_name(self.certificate.subject)
            .not_valid_before(now - BACKDATING)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(key_identifier(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def public_key_of_request(csr: bytes) -> ec.EllipticCurvePublicKey:
    """Give the public key of a signing request whose sender holds the private one.

    Raises:
        EnrolmentError: the request is damaged, not signed by its key, or the key not P-256.
    """
    if len(csr) > MAX_REQUEST_BYTES:
        raise EnrolmentError(f"a signing request of {len(csr)} bytes is over {MAX_REQUEST_BYTES}")
    try:
        request = x509.load_der_x509_csr(csr)
        key, is_signed = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError) as error:
        raise EnrolmentError(f"the signing request cannot be read ({error})") from error
    if not is_signed:
        raise EnrolmentError("the signing request is not signed by its own key; make a new one")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EnrolmentError("the signing request's key is not a P-256 key; make a new one")
    return key


def self_signed(
    key: ec.EllipticCurvePrivateKey,
    trust_domain: str,
    now: datetime,
    *,
    path_length: int = 0,
    lifetime: timedelta = AUTHORITY_LIFETIME,
    what: str = "authority",
) -> x509.Certificate:
    """Make the certificate that devices pin: an authority's, or with path length 1 a root's.

    Raises:
        ValueError: the trust domain has other characters than a host name.
    """
    if not is_trust_domain(trust_domain):
        raise ValueError(
            f"trust domain {trust_domain!r} may only have a-z, 0-9, '-' and '.', as a host name"
        )
    subject = common_name(f"Minga {what} of {trust_domain}")
    return (
        authority_builder(
            subject,
            key.public_key(),
            trust_domain,
            path_length=path_length,
            serial_number=x509.random_serial_number(),
        )
        .issuer_name(subject)
        .not_valid_before(now - BACKDATING)
        .not_valid_after(now + lifetime)
        .sign(key, hashes.SHA256())
    )


def authority_builder(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    trust_domain: str,
    *,
    path_length: int,
    serial_number: int,
) -> x509.CertificateBuilder:
    """Start the certificate of an authority, which may sign others."""
    uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")
    return (
        _builder(subject, public_key, serial_number)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    )


def key_identifier(issuer_key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    """Name the key that signs a certificate, for who looks for it."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(issuer_key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def common_name(text: str) -> x509.Name:
    """Make a subject for human eyes; X.509 has room for 64 characters."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(
    subject: x509.Name, public_key: ec.EllipticCurvePublicKey, serial_number: int
) -> x509.CertificateBuilder:
    """Start a certificate with what all certificates have."""
    subject_key = x509.SubjectKeyIdentifier.from_public_key(public_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(serial_number)
        .add_extension(subject_key, critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
