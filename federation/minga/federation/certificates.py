"""What a certificate says, when it holds, and the way from it up to the authority.

Rules:

1. An authority says itself how it issues. One of path length 1 is an **offline root**: it signs
   intermediates, and these issue. Any other issues leaves directly, and has no intermediate.
2. An intermediate is signed by the root, has path length 0 and names the root's trust domain. Its
   serial number counts: of two intermediates of a root the larger number is the newer one.
3. A chain, on the wire or in a file, is the leaf and behind it its intermediate, if there is one.
   The authority itself never travels: whoever verifies has it from elsewhere.
4. A leaf counts only while it is valid and its issuer has not ended.

Not here: whom a certificate names and what its key signed (`identity`), issuing
(`coordinator.authority`, `coordinator.root`).
"""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from minga.federation.errors import IdentityError
from minga.federation.limits import MAX_CERTIFICATE_BYTES

RENEWAL_SHARE: Final = 2 / 3
"""A certificate is renewed when this share of its lifetime is over."""

RENEWAL_SPREAD: Final = 1 / 12
"""Renewals are spread over this share of the lifetime, so that a fleet does not come at once."""

TRUST_DOMAIN: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")

_SEQUENCE: Final = 0x30
_LONG_LENGTH: Final = 0x80


# -- reading ----------------------------------------------------------------------------------


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


def parse_chain(der: bytes) -> tuple[x509.Certificate, x509.Certificate | None]:
    """Read a leaf and its intermediate, if there is one, from DER after DER.

    Raises:
        IdentityError: they are too large, no certificates, or more than two.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(
            f"certificates of {len(der)} bytes are larger than the {MAX_CERTIFICATE_BYTES} allowed"
        )
    end = _length_of_first(der)
    leaf = parse_certificate(der[:end])
    return leaf, parse_certificate(der[end:]) if der[end:] else None


def _length_of_first(der: bytes) -> int:
    """Say how long the first of several DER values is (X.690, 8.1.3); all, if it is none."""
    if len(der) < 2 or der[0] != _SEQUENCE:
        return len(der)
    if der[1] < _LONG_LENGTH:
        return 2 + der[1]
    num_bytes = der[1] - _LONG_LENGTH
    return 2 + num_bytes + int.from_bytes(der[2 : 2 + num_bytes], "big")


def chain_to_der(leaf: x509.Certificate, intermediate: x509.Certificate | None) -> bytes:
    """Write what `parse_chain` reads."""
    return b"".join(c.public_bytes(Encoding.DER) for c in (leaf, intermediate) if c is not None)


def chain_to_pem(leaf: x509.Certificate, intermediate: x509.Certificate | None) -> bytes:
    """Write a chain as TLS libraries want it."""
    return b"".join(c.public_bytes(Encoding.PEM) for c in (leaf, intermediate) if c is not None)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate from a PEM file.

    Raises:
        IdentityError: the file is missing or damaged, or holds more than one.
    """
    certificates = _load_all(path)
    if len(certificates) > 1:
        raise IdentityError(f"{path} holds {len(certificates)} certificates, expected one")
    return certificates[0]


def load_chain(path: Path) -> tuple[x509.Certificate, x509.Certificate | None]:
    """Read a leaf and its intermediate, if there is one, from a PEM file.

    Raises:
        IdentityError: the file is missing or damaged, or holds more than two.
    """
    leaf, *above = _load_all(path)
    if len(above) > 1:
        raise IdentityError(f"{path} holds {1 + len(above)} certificates, expected two at most")
    return leaf, above[0] if above else None


def _load_all(path: Path) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(f"cannot read the certificate {path}: {error}") from error


def is_trust_domain(text: str) -> bool:
    """Tell whether a federation's certificates may carry this trust domain."""
    return TRUST_DOMAIN.fullmatch(text) is not None


def trust_domain_of(authority: x509.Certificate) -> str:
    """Read the trust domain of an authority, or of an intermediate, from its own URI.

    Raises:
        IdentityError: the certificate is not one of Minga's authorities.
    """
    scheme, _, domain = only_uri(authority).partition("://")
    if scheme != "spiffe" or not is_trust_domain(domain):
        raise IdentityError("the authority's certificate names no trust domain")
    return domain


def only_uri(certificate: x509.Certificate) -> str:
    """Give the one alternative name that a certificate has.

    Raises:
        IdentityError: it has none, several, or one that is no URI.
    """
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


def renewal_time(certificate: x509.Certificate) -> datetime:
    """Say from when on a certificate should be replaced: after about two thirds of its lifetime.

    The exact moment comes from the serial number, which is random: another one for each
    certificate, and the same one after each restart.
    """
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    drawn = certificate.serial_number % 2**32 / 2**32
    return start + (end - start) * (RENEWAL_SHARE + RENEWAL_SPREAD * drawn)


# -- checking ---------------------------------------------------------------------------------


def is_offline_root(authority: x509.Certificate) -> bool:
    """Tell whether an authority issues through intermediates."""
    try:
        constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False
    return constraints.ca and constraints.path_length == 1


def issuer_of(
    intermediate: x509.Certificate | None, authority: x509.Certificate
) -> x509.Certificate:
    """Give the certificate whose key issues leaves: the authority's own, or an intermediate's.

    Whether it is valid at a moment is for `check_not_ended`.

    Args:
        intermediate: What came with the leaf.
        authority: The federation's, as this machine knows it.

    Raises:
        IdentityError: an intermediate is missing, needless, foreign, or not made for that.
    """
    if not is_offline_root(authority):
        if intermediate is not None:
            raise IdentityError("this federation's authority has no intermediates, and one came")
        return authority
    if intermediate is None:
        raise IdentityError("the certificate came without the intermediate that issued it")
    check_issuer(intermediate, authority, "intermediate certificate")
    _check_issues_leaves(intermediate)
    if trust_domain_of(intermediate) != trust_domain_of(authority):
        raise IdentityError(
            f"the intermediate is for trust domain {trust_domain_of(intermediate)!r}, "
            f"expected {trust_domain_of(authority)!r}"
        )
    return intermediate


def is_newer(intermediate: x509.Certificate, other: x509.Certificate) -> bool:
    """Tell whether a root signed an intermediate after another one."""
    return intermediate.serial_number > other.serial_number


def _check_issues_leaves(intermediate: x509.Certificate) -> None:
    try:
        extensions = intermediate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        signs = extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IdentityError(f"the intermediate does not say what it is for ({error})") from error
    if not constraints.ca or constraints.path_length != 0 or not signs:
        raise IdentityError("what came as an intermediate may not issue certificates for others")
    p256_key(intermediate)


def check_issuer(
    certificate: x509.Certificate, issuer: x509.Certificate, what: str = "certificate"
) -> None:
    """Check the issuer's name and signature.

    Raises:
        IdentityError: another one issued it.
    """
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(
            f"the {what} was not issued by this federation's authority; "
            "enrol with a token of this coordinator"
        ) from error


def check_validity(certificate: x509.Certificate, now: datetime) -> None:
    """Check that a leaf holds now.

    Raises:
        IdentityError: it does not, or this machine's clock is wrong.
    """
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


def check_not_ended(issuer: x509.Certificate, now: datetime) -> None:
    """Check that an authority, or the intermediate that it issues through, has not ended.

    When it began does not matter: a clock that was set back makes no valid signature a forged one.

    Raises:
        IdentityError: it has ended, or this machine's clock is wrong.
    """
    end = issuer.not_valid_after_utc
    if now > end:
        raise IdentityError(
            f"the authority's certificate expired on {end:%Y-%m-%d %H:%M} UTC; "
            "the coordinator's operator has to replace it"
        )


def check_usages(certificate: x509.Certificate) -> None:
    """Refuse a certificate that was not made to authenticate a client (RFC 5280, 4.2.1).

    Raises:
        IdentityError: it was made for something else.
    """
    try:
        extensions = certificate.extensions
        is_authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        signs = extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IdentityError(f"the certificate does not say what it is for ({error})") from error
    if is_authority or not signs or ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        raise IdentityError("the certificate is not for clients; use the one from enrolment")


def p256_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Give a certificate's public key.

    Raises:
        IdentityError: it is of another kind than P-256.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the certificate's key is not a P-256 key")
    return key


def digest_of_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Name a public key by the SHA-256 of its SubjectPublicKeyInfo."""
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).digest()
