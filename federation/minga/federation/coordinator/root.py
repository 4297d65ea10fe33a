"""The offline root: an authority on a machine of its own that signs intermediates, and no more.

State: a folder with `root.p12` (0600), the key as PKCS#12, encrypted with a passphrase if there is
one; `root.pem`, what devices pin; and `signed/<number>.pem`, all intermediates that were signed.
The numbers count up, and devices hold to them: an intermediate is stored here before it is given
away, so that no number is given twice. An older copy of the folder would give some again, and
devices refuse what is not newer: keep copies up to date.

The intermediate's key is made by the coordinator and stays there: what comes here is a signing
request, of which nothing but the public key is used. What an intermediate may do is written into
it: no authority below it (path length 0), names of this trust domain alone (a name constraint), TLS
alone (extended key usage), and a limited life.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from minga.federation import durable
from minga.federation.certificates import (
    check_not_ended,
    is_offline_root,
    load_certificate,
    trust_domain_of,
)
from minga.federation.coordinator.authority import (
    BACKDATING,
    DEFAULT_TRUST_DOMAIN,
    authority_builder,
    common_name,
    key_identifier,
    public_key_of_request,
    self_signed,
)
from minga.federation.errors import IdentityError
from minga.federation.identity import Clock, new_key, utc_now

KEY_FILE: Final = "root.p12"
CERTIFICATE_FILE: Final = "root.pem"
SIGNED_FOLDER: Final = "signed"

ROOT_LIFETIME: Final = timedelta(days=7300)
INTERMEDIATE_LIFETIME: Final = timedelta(days=365)
MIN_PASSPHRASE_CHARS: Final = 12

PASSPHRASE_ROUNDS: Final = 2_000_000
"""Rounds of PBKDF2 with SHA-256: about a second for each guess on one core of a slow machine;
OWASP asks for 600,000 (Password Storage Cheat Sheet, 2023)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """Signs the intermediates of one federation."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    clock: Clock = utc_now

    @classmethod
    def create(
        cls,
        folder: Path,
        passphrase: str,
        *,
        trust_domain: str = DEFAULT_TRUST_DOMAIN,
        clock: Clock = utc_now,
    ) -> Self:
        """Make a root in a folder.

        Args:
            folder: Where it is kept; made if missing.
            passphrase: What the key is encrypted with; empty: it is not.
            trust_domain: Named in all certificates of the federation.
            clock: The time to issue by.

        Raises:
            IdentityError: the folder holds a root, or the passphrase is too short.
            ValueError: the trust domain has other characters than a host name.
        """
        if passphrase and len(passphrase) < MIN_PASSPHRASE_CHARS:
            raise IdentityError(
                f"a passphrase has at least {MIN_PASSPHRASE_CHARS} characters; take a few words"
            )
        key = new_key()
        certificate = self_signed(
            key, trust_domain, clock(), path_length=1, lifetime=ROOT_LIFETIME, what="root"
        )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = pkcs12.serialize_key_and_certificates(
            b"minga root", key, None, None, _encryption(passphrase)
        )
        try:
            durable.create_file(folder / KEY_FILE, data, mode=durable.PRIVATE)
        except FileExistsError as error:
            raise IdentityError(
                f"{folder} holds a root already; use another folder, or this root"
            ) from error
        durable.replace_file(folder / CERTIFICATE_FILE, certificate.public_bytes(Encoding.PEM))
        return cls(folder=folder, certificate=certificate, key=key, clock=clock)

    @classmethod
    def open(cls, folder: Path, passphrase: str = "", *, clock: Clock = utc_now) -> Self:
        """Read a root from its folder.

        Raises:
            IdentityError: a file is missing or damaged, the passphrase is wrong, or the root has
                ended.
        """
        certificate = load_certificate(folder / CERTIFICATE_FILE)
        if not is_offline_root(certificate):
            raise IdentityError(f"{folder / CERTIFICATE_FILE} is no offline root's certificate")
        trust_domain_of(certificate)
        key = _load_key(folder / KEY_FILE, passphrase)
        if certificate.public_key() != key.public_key():
            raise IdentityError(f"{folder / KEY_FILE} is not the key of its certificate")
        check_not_ended(certificate, clock())
        return cls(folder=folder, certificate=certificate, key=key, clock=clock)

    def sign(self, csr: bytes, lifetime: timedelta = INTERMEDIATE_LIFETIME) -> x509.Certificate:
        """Sign an intermediate; devices that see it refuse all that were signed before.

        Args:
            csr: PKCS#10 in DER; only its public key is used.
            lifetime: How long it holds, as far as the root does.

        Raises:
            EnrolmentError: the request is damaged, not signed by its key, or the key not P-256.
        """
        public_key = public_key_of_request(csr)
        number = max(numbers_signed(self.folder), default=0) + 1
        domain = trust_domain_of(self.certificate)
        now = self.clock()
        constraint = x509.NameConstraints([x509.UniformResourceIdentifier(domain)], None)
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            authority_builder(
                common_name(f"Minga intermediate {number} of {domain}"),
                public_key,
                domain,
                path_length=0,
                serial_number=number,
            )
            .issuer_name(self.certificate.subject)
            .not_valid_before(now - BACKDATING)
            .not_valid_after(min(now + lifetime, self.certificate.not_valid_after_utc))
            .add_extension(constraint, critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(key_identifier(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        path = self.path_of(number)
        path.parent.mkdir(exist_ok=True)
        durable.create_file(path, certificate.public_bytes(Encoding.PEM))
        durable.sync_folder(self.folder)
        return certificate

    def path_of(self, number: int) -> Path:
        """Name the file that keeps an intermediate that was signed."""
        return self.folder / SIGNED_FOLDER / f"{number}.pem"


def is_encrypted(folder: Path) -> bool:
    """Tell whether a root's key asks for a passphrase.

    Raises:
        IdentityError: there is no key.
    """
    try:
        pkcs12.load_key_and_certificates((folder / KEY_FILE).read_bytes(), None)
    except OSError as error:
        raise IdentityError(
            f"no root in {folder} ({error.strerror}); make one with: minga root create"
        ) from error
    except ValueError:
        return True
    return False


def numbers_signed(folder: Path) -> list[int]:
    """Give the numbers of all intermediates that a root has signed, in order."""
    names = (path.stem for path in (folder / SIGNED_FOLDER).glob("*.pem"))
    return sorted(int(name) for name in names if name.isdecimal())


def fingerprint(certificate: x509.Certificate) -> str:
    """Give SHA-256 of a certificate in groups that people can compare."""
    text = certificate.fingerprint(hashes.SHA256()).hex()
    return " ".join(text[start : start + 8] for start in range(0, len(text), 8))


def _encryption(passphrase: str) -> KeySerializationEncryption:
    if not passphrase:
        return NoEncryption()
    return (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(PASSPHRASE_ROUNDS)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(passphrase.encode())
    )


def _load_key(path: Path, passphrase: str) -> ec.EllipticCurvePrivateKey:
    try:
        key, _, _ = pkcs12.load_key_and_certificates(path.read_bytes(), passphrase.encode() or None)
    except OSError as error:
        raise IdentityError(f"cannot read the key {path} ({error.strerror})") from error
    except ValueError as error:
        raise IdentityError(f"the passphrase is wrong, or {path} is damaged") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} holds no root's key")
    return key
