"""Who somebody is: keys, certificates, names, and the folder that holds them.

Rules:

1. A key is P-256 and never leaves the machine that made it: what travels is a signing request.
2. A certificate names its holder in exactly one URI `spiffe://<trust domain>/<role>/<name>` and in
   nothing else. The subject is for human eyes; nobody here reads it.
3. A certificate counts only while its issuer's signature, the validity of both, the usages and
   the trust domain all hold. The issuer is the authority that a token pinned, or the newest
   intermediate of it that the holder has seen (`certificates`); never another one, so there is no
   path to build. A holder moves to a newer intermediate, and never back: it is in `cert.pem`.
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
from cryptography.x509.oid import NameOID

from minga.federation import durable
from minga.federation.certificates import (
    TRUST_DOMAIN,
    chain_to_der,
    chain_to_pem,
    check_issuer,
    check_not_ended,
    check_usages,
    check_validity,
    digest_of_key,
    is_newer,
    is_trust_domain,
    issuer_of,
    load_certificate,
    load_chain,
    only_uri,
    p256_key,
    parse_certificate,
    parse_chain,
    trust_domain_of,
)
from minga.federation.errors import IdentityError
from minga.federation.limits import MAX_NAME_LENGTH, VERIFIED_CERTIFICATES

KEY_FILE: Final = "key.pem"
CERTIFICATE_FILE: Final = "cert.pem"
AUTHORITY_FILE: Final = "ca.pem"

SIGNATURE_PREFIX: Final = b"minga.federation.v1/identity-signature\x00"

Clock = Callable[[], datetime]
"""Gives the time, with its time zone."""

_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{MAX_NAME_LENGTH - 1}}}")
_SPIFFE_URI: Final = re.compile(
    rf"spiffe://(?P<domain>{TRUST_DOMAIN.pattern})/(?P<role>[a-z]+)/(?P<name>{_NAME.pattern})"
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
    """Who makes a call, as its certificate says.

    Attributes:
        role: What it is.
        name: Which one.
        serial: The certificate's serial number.
        key_digest: SHA-256 of the certificate's public key, 32 bytes.
    """

    role: Role
    name: str
    serial: int
    key_digest: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """Role and name as the certificate's URI has them: `device/press-7`."""
        return f"{self.role}/{self.name}"

    def __str__(self) -> str:
        """Give role and name, for messages."""
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A private key with its certificate and the authority that it trusts.

    `key` is kept out of the representation: an identity may be logged.

    Attributes:
        authority: The federation's, as the token pinned it.
        intermediate: Who issued the certificate in the authority's name; None: the authority did.
    """

    role: Role
    name: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate
    authority: x509.Certificate
    intermediate: x509.Certificate | None = None

    @classmethod
    def of(
        cls,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        authority: x509.Certificate,
        intermediate: x509.Certificate | None = None,
    ) -> Self:
        """Put key and certificates together; role and name are the certificate's.

        Raises:
            IdentityError: the certificate is for another key, or names its holder oddly, or the
                intermediate is not the authority's.
        """
        if certificate.public_key() != key.public_key():
            raise IdentityError("the certificate belongs to another key; enrol again")
        issuer_of(intermediate, authority)
        principal = principal_of(certificate)
        return cls(
            role=principal.role,
            name=principal.name,
            key=key,
            certificate=certificate,
            authority=authority,
            intermediate=intermediate,
        )

    @property
    def device_id(self) -> str:
        """The name, in the words of the wire."""
        return self.name

    @property
    def issuer(self) -> x509.Certificate:
        """Who issues all certificates that count beside this one."""
        return self.intermediate or self.authority

    @property
    def certificate_der(self) -> bytes:
        """The certificate alone, as peers with the same issuer receive it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def chain_der(self) -> bytes:
        """The certificate and its intermediate, for who knows the authority alone."""
        return chain_to_der(self.certificate, self.intermediate)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate and its intermediate, as TLS libraries want them."""
        return chain_to_pem(self.certificate, self.intermediate)

    @property
    def authority_pem(self) -> bytes:
        """The authority's certificate as TLS libraries want it."""
        return self.authority.public_bytes(serialization.Encoding.PEM)

    @property
    def issuer_pem(self) -> bytes:
        """The issuer's certificate as TLS libraries want it."""
        return self.issuer.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """Give the private key, unencrypted; no property, so that no printer shows it."""
        return key_to_pem(self.key)

    def sign(self, message: bytes) -> bytes:
        """Sign with ECDSA over SHA-256; `CertificateVerifier` checks it."""
        return self.key.sign(SIGNATURE_PREFIX + message, ec.ECDSA(hashes.SHA256()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    """A server's key and chain, PEM, with the authority that its clients are checked against.

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
    """Checks that a device, or another role, signed a message; knows nothing but who issues.

    `authority` is an identity's `issuer`: what an intermediate before it issued does not count.
    """

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
            p256_key(parsed).verify(
                signature, SIGNATURE_PREFIX + message, ec.ECDSA(hashes.SHA256())
            )
        except InvalidSignature as error:
            raise IdentityError(f"the signature is not by {signer}") from error


# -- names ------------------------------------------------------------------------------------


def is_name(text: str) -> bool:
    """Tell whether a device, operator, service or group may be called so."""
    return _NAME.fullmatch(text) is not None


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


def verify_certificate(
    certificate_der: bytes, issuer: x509.Certificate, now: datetime
) -> Principal:
    """Check a client certificate against who must have issued it, and that it is valid itself.

    Raises:
        IdentityError: any rule of the module's docstring is broken; the message says which one.
    """
    return _verify(certificate_der, issuer, now)[1]


def verify_chain(
    chain_der: bytes, authority: x509.Certificate, now: datetime
) -> tuple[x509.Certificate, Principal]:
    """Check a client certificate that comes with its intermediate; gives issuer and holder.

    Any intermediate of the authority will do: who trusts one alone compares.

    Raises:
        IdentityError: as `verify_certificate`, for any of the two.
    """
    leaf, intermediate = parse_chain(chain_der)
    issuer = issuer_of(intermediate, authority)
    return issuer, verify_certificate(leaf.public_bytes(serialization.Encoding.DER), issuer, now)


def accept_certificate(
    chain_der: bytes,
    key: ec.EllipticCurvePrivateKey,
    *,
    expected: tuple[Role, str],
    authority: x509.Certificate,
    issuer: x509.Certificate,
    now: datetime,
) -> Identity:
    """Make an identity of what a coordinator answered to a signing request.

    Args:
        chain_der: The certificate and its intermediate, if there is one.
        key: Whose certificate it must be.
        expected: Role and name that it must give.
        authority: The federation's: it stays, whatever the answer says.
        issuer: Who issued until now: this one again, or a newer intermediate.
        now: The time to check by.

    Raises:
        IdentityError: it is not what was asked for, or an older issuer's.
    """
    now_issuer, principal = verify_chain(chain_der, authority, now)
    if (principal.role, principal.name) != expected:
        raise IdentityError(f"the coordinator answered with a certificate of {principal}")
    if now_issuer != issuer and not is_newer(now_issuer, issuer):
        raise IdentityError(
            f"the coordinator issues with intermediate {now_issuer.serial_number}, which was "
            f"replaced by {issuer.serial_number}; it may be a thief's"
        )
    leaf, intermediate = parse_chain(chain_der)
    return Identity.of(key, leaf, authority, intermediate)


def _verify(
    certificate_der: bytes, issuer: x509.Certificate, now: datetime
) -> tuple[x509.Certificate, Principal]:
    certificate, principal = _verified(certificate_der, issuer)
    check_validity(certificate, now)
    check_not_ended(issuer, now)
    return certificate, principal


@lru_cache(maxsize=VERIFIED_CERTIFICATES)
def _verified(
    certificate_der: bytes, issuer: x509.Certificate
) -> tuple[x509.Certificate, Principal]:
    """Check all that time does not change: the same bytes pass for ever, or never."""
    certificate = parse_certificate(certificate_der)
    check_issuer(certificate, issuer)
    check_usages(certificate)
    p256_key(certificate)
    domain, principal = _holder(certificate)
    if domain != trust_domain_of(issuer):
        raise IdentityError(
            f"the certificate of {principal} is for trust domain {domain!r}, "
            f"expected {trust_domain_of(issuer)!r}"
        )
    return certificate, principal


def _holder(certificate: x509.Certificate) -> tuple[str, Principal]:
    """Read trust domain and principal."""
    uri = only_uri(certificate)
    match = _SPIFFE_URI.fullmatch(uri)
    if match is None:
        raise IdentityError(
            f"the certificate's name {uri!r} is not spiffe://<trust domain>/<role>/<name>"
        )
    if match["role"] not in set(Role):
        raise IdentityError(f"the certificate's role {match['role']!r} is not one of {list(Role)}")
    principal = Principal(
        role=Role(match["role"]),
        name=match["name"],
        serial=certificate.serial_number,
        key_digest=digest_of_key(p256_key(certificate)),
    )
    return match["domain"], principal


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
    return load_key(path)


def save_identity(folder: Path, identity: Identity) -> None:
    """Write an identity's certificates, or renew them; the key must be there already.

    The authority comes first and the certificate last, with its intermediate in the same file: its
    presence says that all is there.

    Raises:
        IdentityError: the folder's key is another one.
    """
    if load_key(folder / KEY_FILE).public_key() != identity.key.public_key():
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
    certificate, intermediate = load_chain(folder / CERTIFICATE_FILE)
    return Identity.of(
        load_key(folder / KEY_FILE),
        certificate,
        load_certificate(folder / AUTHORITY_FILE),
        intermediate,
    )


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        IdentityError: the file is missing, or holds something else.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        # The cause's text may quote the file: only its kind is told.
        raise IdentityError(f"cannot read the key {path} ({type(error).__name__})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"the key {path} is not a P-256 key; remove it and enrol again")
    return key
