"""The federation's own certificate authority.

State: a folder with `authority.key.pem` (0600) and `authority.pem`, made on first use and read
from then on. Both are created exclusively and the key comes first, so that a crash in between, or
two processes that start at once, still end with one key and one certificate.

What is issued takes from a signing request nothing but the public key, after its signature proved
that the requester holds the private one. Names come from the caller, who knows what the token or
the operator allowed. Certificates start five minutes back, for clocks that are late.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from minga.federation import durable
from minga.federation.errors import EnrolmentError, IdentityError
from minga.federation.identity import (
    Clock,
    Role,
    ServerIdentity,
    is_trust_domain,
    key_to_pem,
    load_certificate,
    load_or_create_key,
    new_key,
    spiffe_uri,
    trust_domain_of,
    utc_now,
)
from minga.federation.limits import MAX_REQUEST_BYTES

AUTHORITY_FOLDER: Final = "authority"
"""Its place in the coordinator's state folder."""

KEY_FILE: Final = "authority.key.pem"
CERTIFICATE_FILE: Final = "authority.pem"
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
    """Issues the certificates of one federation."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
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
            trust_domain: Named in all certificates; has effect on first use only.
            lifetimes: How long issued certificates hold.
            clock: The time to issue by.

        Raises:
            IdentityError: the files are damaged or do not belong together.
            ValueError: the trust domain has other characters than a host name.
        """
        key = load_or_create_key(folder / KEY_FILE)
        path = folder / CERTIFICATE_FILE
        if not path.exists():
            certificate = _self_signed(key, trust_domain, clock)
            # If another process is faster, its certificate is the one.
            with suppress(FileExistsError):
                durable.create_file(path, certificate.public_bytes(serialization.Encoding.PEM))
        certificate = load_certificate(path)
        if certificate.public_key() != key.public_key():
            raise IdentityError(f"{path} does not belong to {folder / KEY_FILE}; restore the pair")
        trust_domain_of(certificate)
        return cls(
            certificate=certificate, key=key, lifetimes=lifetimes or Lifetimes(), clock=clock
        )

    @property
    def certificate_der(self) -> bytes:
        """The authority's certificate as tokens carry it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's certificate as TLS libraries want it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

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
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
            authority_pem=self.certificate_pem,
        )

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        lifetime: timedelta,
        names: Iterable[x509.GeneralName],
        purpose: x509.ObjectIdentifier,
    ) -> x509.Certificate:
        now = self.clock()
        end = min(now + lifetime, self.certificate.not_valid_after_utc)
        authority_key = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        return (
            _builder(_subject(common_name), public_key)
            .issuer_name(self.certificate.subject)
            .not_valid_before(now - BACKDATING)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_key),
                critical=False,
            )
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


def _self_signed(
    key: ec.EllipticCurvePrivateKey, trust_domain: str, clock: Clock
) -> x509.Certificate:
    if not is_trust_domain(trust_domain):
        raise ValueError(
            f"trust domain {trust_domain!r} may only have a-z, 0-9, '-' and '.', as a host name"
        )
    now = clock()
    subject = _subject(f"Minga authority of {trust_domain}"[:64])
    uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")
    return (
        _builder(subject, key.public_key())
        .issuer_name(subject)
        .not_valid_before(now - BACKDATING)
        .not_valid_after(now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    """Start a certificate with what all certificates have, a random serial number among it."""
    subject_key = x509.SubjectKeyIdentifier.from_public_key(public_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .add_extension(subject_key, critical=False)
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


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
