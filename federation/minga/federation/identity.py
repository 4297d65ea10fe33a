"""Who somebody is: keys, certificates, names, and the folder that holds them.

Rules:

1. A key is P-256 and never leaves the machine that made it: what travels is a signing request.
2. A certificate names its holder in exactly one URI `spiffe://<trust domain>/<role>/<name>` and in
   nothing else. The subject is for human eyes; nobody here reads it.
3. A certificate counts only while the authority's signature, the validity, the usages and the
   trust domain all hold. The authority issues leaves directly: there are no intermediates, so
   there is no path to build.
4. A signature covers a prefix of its own, so that it cannot be mistaken for one made elsewhere
   with the same key (TLS, signing requests).

Not here: issuing (`coordinator.authority`), revocation (`coordinator.access`), TLS (`transport`).
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from minga.federation import durable
from minga.federation.errors import IdentityError
from minga.federation.limits import (
    MAX_CERTIFICATE_BYTES,
    MAX_NAME_LENGTH,
    VERIFIED_CERTIFICATES,
)

KEY_FILE: Final = "key.pem"
CERTIFICATE_FILE: Final = "cert.pem"
AUTHORITY_FILE: Final = "ca.pem"

SIGNATURE_PREFIX: Final = b"minga.federation.v1/identity-signature\x00"

RENEWAL_SHARE: Final = 2 / 3
"""A certificate is renewed when this share of its lifetime is over."""

RENEWAL_SPREAD: Final = 1 / 12
"""Renewals are spread over this share of the lifetime, so that a fleet does not come at once."""

Clock = Callable[[], datetime]
"""Gives the time, with its time zone."""

_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{MAX_NAME_LENGTH - 1}}}")
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")
_SPIFFE_URI: Final = re.compile(
    rf"spiffe://(?P<domain>{_TRUST_DOMAIN.pattern})/(?P<role>[a-z]+)/(?P<name>{_NAME.pattern})"
)


def utc_now() -> datetime:
    """Give the time of this machine's clock."""
    return datetime.now(UTC)


class Role(StrEnum):
    """What a certificate's holder is to the federation."""

    DEVICE = "device"
    OPERATOR = "operator"
    SERVICE = "service"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who makes a call, as its certificate says."""

    role: Role
    name: str
    serial: int

    @property
    def path(self) -> str:
        """Role and name as the certificate's URI has them: `device/press-7`."""
        return f"{self.role}/{self.name}"

    def __str__(self) -> str:
        """Give role and name, for messages."""
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A private key with its certificate and the authority that issued it.

    `key` is kept out of the representation: an identity may be logged.
    """

    role: Role
    name: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate
    authority: x509.Certificate

    @classmethod
    def of(
        cls,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        authority: x509.Certificate,
    ) -> Self:
        """Put key and certificate together; role and name are the certificate's.

        Raises:
            IdentityError: the certificate is for another key, or names its holder oddly.
        """
        if certificate.public_key() != key.public_key():
            raise IdentityError("the certificate belongs to another key; enrol again")
        principal = principal_of(certificate)
        return cls(
            role=principal.role,
            name=principal.name,
            key=key,
            certificate=certificate,
            authority=authority,
        )

    @property
    def device_id(self) -> str:
        """The name, in the words of the wire."""
        return self.name

    @property
    def certificate_der(self) -> bytes:
        """The certificate as peers receive it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as TLS libraries want it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def authority_pem(self) -> bytes:
        """The authority's certificate as TLS libraries want it."""
        return self.authority.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """Give the private key, unencrypted; no property, so that no printer shows it."""
        return key_to_pem(self.key)

    def sign(self, message: bytes) -> bytes:
        """Sign with ECDSA over SHA-256; `CertificateVerifier` checks it."""
        return self.key.sign(SIGNATURE_PREFIX + message, ec.ECDSA(hashes.SHA256()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    """A server's key and certificate, PEM, with the authority that its clients are checked against.

    The key lives in memory only: a coordinator makes another one at each start and each renewal.
    """

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes
    authority_pem: bytes

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate, taken apart."""
        return x509.load_pem_x509_certificate(self.certificate_pem)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateVerifier:
    """Checks that a device, or another role, signed a message; knows nothing but the authority."""

    authority: x509.Certificate
    clock: Clock = utc_now
    role: Role = Role.DEVICE

    def verify(self, device_id: str, certificate: bytes, signature: bytes, message: bytes) -> None:
        """Check a signature made by `Identity.sign`.

        Args:
            device_id: Who claims to have signed: the name of a holder of the role.
            certificate: The signer's certificate, DER, as it came over the wire.
            signature: ECDSA over SHA-256, DER.
            message: What was signed.

        Raises:
            IdentityError: the certificate does not hold, is not that holder's, or did not sign.
        """
        parsed, principal = _verify(certificate, self.authority, self.clock())
        signer = f"{self.role} {device_id!r}"
        if (principal.role, principal.name) != (self.role, device_id):
            raise IdentityError(f"the certificate is of {principal}, not of {signer}")
        try:
            _p256(parsed).verify(signature, SIGNATURE_PREFIX + message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise IdentityError(f"the signature is not by {signer}") from error


# -- names ------------------------------------------------------------------------------------


def is_name(text: str) -> bool:
    """Tell whether a device, operator, service or group may be called so."""
    return _NAME.fullmatch(text) is not None


def is_trust_domain(text: str) -> bool:
    """Tell whether a federation's certificates may carry this trust domain."""
    return _TRUST_DOMAIN.fullmatch(text) is not None


def spiffe_uri(trust_domain: str, role: Role, name: str) -> str:
    """Give the URI that names a certificate's holder.

    The form is that of SPIFFE-ID, section 2 (https://spiffe.io/docs/latest/spiffe-specs/spiffe-id).
    """
    assert is_trust_domain(trust_domain)
    assert is_name(name)
    return f"spiffe://{trust_domain}/{role}/{name}"


def principal_of(certificate: x509.Certificate) -> Principal:
    """Read the holder's role and name. Nothing is verified: see `verify_certificate`.

    Raises:
        IdentityError: the names are not exactly one URI of our form.
    """
    return _holder(certificate)[1]


# -- keys and certificates --------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def make_csr(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Make a signing request, PKCS#10 in DER; its signature proves possession of the key.

    The name is for people who look into it: the authority takes the name from elsewhere.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a private key as unencrypted PKCS#8."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def parse_certificate(der: bytes) -> x509.Certificate:
    """Read a certificate from DER.

    Raises:
        IdentityError: it is too large or no certificate.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(
            f"a certificate of {len(der)} bytes is larger than the {MAX_CERTIFICATE_BYTES} allowed"
        )
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion) as error:
        raise IdentityError(f"the bytes are no X.509 certificate ({error})") from error


def renewal_time(certificate: x509.Certificate) -> datetime:
    """Say from when on a certificate should be replaced: after about two thirds of its lifetime.

    The exact moment comes from the serial number, which is random: another one for each
    certificate, and the same one after each restart.
    """
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    drawn = certificate.serial_number % 2**32 / 2**32
    return start + (end - start) * (RENEWAL_SHARE + RENEWAL_SPREAD * drawn)


def verify_certificate(
    certificate_der: bytes, authority: x509.Certificate, now: datetime
) -> Principal:
    """Check a client certificate against the authority.

    Raises:
        IdentityError: any rule of the module's docstring is broken; the message says which one.
    """
    return _verify(certificate_der, authority, now)[1]


def _verify(
    certificate_der: bytes, authority: x509.Certificate, now: datetime
) -> tuple[x509.Certificate, Principal]:
    certificate, principal = _verified(certificate_der, authority)
    _check_validity(certificate, now)
    return certificate, principal


@lru_cache(maxsize=VERIFIED_CERTIFICATES)
def _verified(
    certificate_der: bytes, authority: x509.Certificate
) -> tuple[x509.Certificate, Principal]:
    """Check all that time does not change: the same bytes pass for ever, or never."""
    certificate = parse_certificate(certificate_der)
    _check_issuer(certificate, authority)
    _check_usages(certificate)
    _p256(certificate)
    domain, principal = _holder(certificate)
    if domain != trust_domain_of(authority):
        raise IdentityError(
            f"the certificate of {principal} is for trust domain {domain!r}, "
            f"expected {trust_domain_of(authority)!r}"
        )
    return certificate, principal


def trust_domain_of(authority: x509.Certificate) -> str:
    """Read an authority's trust domain from its own URI `spiffe://<trust domain>`.

    Raises:
        IdentityError: the certificate is not one of Minga's authorities.
    """
    scheme, _, domain = _only_uri(authority).partition("://")
    if scheme != "spiffe" or not is_trust_domain(domain):
        raise IdentityError("the authority's certificate names no trust domain")
    return domain


def _holder(certificate: x509.Certificate) -> tuple[str, Principal]:
    """Read trust domain and principal."""
    uri = _only_uri(certificate)
    match = _SPIFFE_URI.fullmatch(uri)
    if match is None:
        raise IdentityError(
            f"the certificate's name {uri!r} is not spiffe://<trust domain>/<role>/<name>"
        )
    if match["role"] not in set(Role):
        raise IdentityError(f"the certificate's role {match['role']!r} is not one of {list(Role)}")
    principal = Principal(
        role=Role(match["role"]), name=match["name"], serial=certificate.serial_number
    )
    return match["domain"], principal


def _only_uri(certificate: x509.Certificate) -> str:
    try:
        names = list(
            certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IdentityError(f"the certificate names no holder ({error})") from error
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise IdentityError(
            f"the certificate has {len(names)} alternative names, expected one URI alone"
        )
    return names[0].value


def _check_issuer(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(
            "the certificate was not issued by this federation's authority; "
            "enrol with a token of this coordinator"
        ) from error


def _check_validity(certificate: x509.Certificate, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        raise IdentityError(
            f"the certificate is valid from {start:%Y-%m-%d %H:%M} UTC on and it is "
            f"{now:%Y-%m-%d %H:%M} now; check this machine's clock"
        )
    if now > end:
        raise IdentityError(
            f"the certificate expired on {end:%Y-%m-%d %H:%M} UTC; enrol again with a new token"
        )


def _check_usages(certificate: x509.Certificate) -> None:
    """Refuse a certificate that was not made to authenticate a client (RFC 5280, 4.2.1)."""
    try:
        extensions = certificate.extensions
        is_authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        signs = extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IdentityError(f"the certificate does not say what it is for ({error})") from error
    if is_authority or not signs or ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise IdentityError("the certificate is not for clients; use the one from enrolment")


def _p256(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the certificate's key is not a P-256 key")
    return key


# -- the identity folder ----------------------------------------------------------------------


def holds_identity(folder: Path) -> bool:
    """Tell whether a folder holds a complete identity: the certificate is written last."""
    return (folder / CERTIFICATE_FILE).exists()


def load_or_create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key, or make it: of two processes that make it at once both get one key.

    Raises:
        IdentityError: the file holds something else.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # If another process is faster, its key is the one.
        with suppress(FileExistsError):
            durable.create_file(path, key_to_pem(new_key()), mode=durable.PRIVATE)
    return _load_key(path)


def save_identity(folder: Path, identity: Identity) -> None:
    """Write an identity's certificates, or renew them; the key must be there already.

    The authority comes first and the certificate last: its presence says that all is there.

    Raises:
        IdentityError: the folder's key is another one.
    """
    if _load_key(folder / KEY_FILE).public_key() != identity.key.public_key():
        raise IdentityError(f"the key in {folder} belongs to another identity; use another folder")
    durable.replace_file(folder / AUTHORITY_FILE, identity.authority_pem)
    durable.replace_file(folder / CERTIFICATE_FILE, identity.certificate_pem)


def load_identity(folder: Path) -> Identity:
    """Read an identity from its folder.

    Raises:
        IdentityError: a file is missing or damaged, or they do not belong together.
    """
    if not holds_identity(folder):
        raise IdentityError(f"no identity in {folder}; enrol first: minga device enroll")
    return Identity.of(
        _load_key(folder / KEY_FILE),
        load_certificate(folder / CERTIFICATE_FILE),
        load_certificate(folder / AUTHORITY_FILE),
    )


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate from a PEM file.

    Raises:
        IdentityError: the file is missing or damaged.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(f"cannot read the certificate {path}: {error}") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        # The cause's text may quote the file: only its kind is told.
        raise IdentityError(f"cannot read the key {path} ({type(error).__name__})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"the key {path} is not a P-256 key; remove it and enrol again")
    return key
