"""How a coordinator gets its intermediate from an offline root, and another one later.

State, in the authority's folder: `root.pem`, which makes the federation one with an offline root;
`next.key.pem`, the key of a request that is under way; `authority.pem` and its key, the
intermediate in use. A coordinator that runs goes on with what it has and takes the new one at its
next start.

1. `request` makes a new key and a signing request; a request from before is void by that.
2. The root's operator signs it (`coordinator.root`), on the other machine.
3. `install` checks what came back and puts it in place. The certificate is what decides: if the
   machine stops before the key has its place too, `settle` puts it there at the next start.

A key is never signed twice: who may have seen the one in use is locked out by the next one.
"""

from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from minga.federation import durable
from minga.federation.certificates import (
    check_not_ended,
    is_newer,
    is_offline_root,
    issuer_of,
    load_certificate,
    trust_domain_of,
)
from minga.federation.errors import EnrolmentError, FederationError, IdentityError
from minga.federation.identity import key_to_pem, load_key, make_csr, new_key

ROOT_FILE: Final = "root.pem"
KEY_FILE: Final = "authority.key.pem"
CERTIFICATE_FILE: Final = "authority.pem"
NEXT_KEY_FILE: Final = "next.key.pem"


def request(folder: Path, root: x509.Certificate, now: datetime) -> bytes:
    """Make a key and ask for an intermediate.

    Args:
        folder: The authority's folder in the coordinator's state folder; made if missing.
        root: The offline root's certificate.
        now: The time to check it by.

    Returns:
        The signing request, PKCS#10 in DER.

    Raises:
        IdentityError: the certificate is no offline root's, or the federation has another
            authority: its devices would not know this one.
    """
    if not is_offline_root(root):
        raise IdentityError(
            "the certificate is no offline root's; make one with: minga root create"
        )
    trust_domain_of(root)
    check_not_ended(root, now)
    if (folder / ROOT_FILE).exists():
        if load_certificate(folder / ROOT_FILE) != root:
            raise IdentityError(f"the federation in {folder} has another root; ask that one")
    elif (folder / CERTIFICATE_FILE).exists():
        raise IdentityError(
            f"the federation in {folder} has an authority of its own, which its devices trust; "
            "begin with an empty state folder and enrol the devices there"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = new_key()
    durable.replace_file(folder / NEXT_KEY_FILE, key_to_pem(key), mode=durable.PRIVATE)
    durable.replace_file(folder / ROOT_FILE, root.public_bytes(Encoding.PEM))
    return make_csr(key, "Minga intermediate")


def write_request(path: Path, csr: bytes) -> None:
    """Write a signing request as PEM, for people and other tools.

    Raises:
        FederationError: the file cannot be written.
    """
    pem = x509.load_der_x509_csr(csr).public_bytes(Encoding.PEM)
    try:
        durable.replace_file(path, pem)
    except OSError as error:
        raise FederationError(f"cannot write {path} ({error.strerror}); name another") from error


def read_request(path: Path) -> bytes:
    """Read a signing request from PEM; gives PKCS#10 in DER.

    Raises:
        EnrolmentError: the file is missing or damaged.
    """
    try:
        return x509.load_pem_x509_csr(path.read_bytes()).public_bytes(Encoding.DER)
    except (OSError, ValueError) as error:
        raise EnrolmentError(f"cannot read the signing request {path}: {error}") from error


def pinned_file(folder: Path) -> Path:
    """Name the file with the certificate that devices trust."""
    root = folder / ROOT_FILE
    return root if root.exists() else folder / CERTIFICATE_FILE


def install(folder: Path, intermediate: x509.Certificate, now: datetime) -> None:
    """Put a signed intermediate in place; doing it again does nothing.

    Raises:
        IdentityError: it is another root's, for another key than was asked for, older than the one
            in use, or not valid.
    """
    if not (folder / ROOT_FILE).exists():
        raise IdentityError(
            f"{folder} waits for no intermediate; begin with: minga coordinator request"
        )
    issuer_of(intermediate, load_certificate(folder / ROOT_FILE))
    check_not_ended(intermediate, now)
    path = folder / CERTIFICATE_FILE
    current = load_certificate(path) if path.exists() else None
    if current != intermediate:
        _require_answer(folder, intermediate, current)
        durable.replace_file(path, intermediate.public_bytes(Encoding.PEM))
    settle(folder)


def _require_answer(
    folder: Path, intermediate: x509.Certificate, current: x509.Certificate | None
) -> None:
    if current is not None and not is_newer(intermediate, current):
        raise IdentityError(
            f"intermediate {intermediate.serial_number} is not newer than "
            f"{current.serial_number}, which is in use; devices would refuse it"
        )
    path = folder / NEXT_KEY_FILE
    if not path.exists() or load_key(path).public_key() != intermediate.public_key():
        raise IdentityError(
            "the intermediate is not for the key of the newest request; sign that request"
        )


def settle(folder: Path) -> None:
    """Give the key of an installed intermediate its place, if it has not got it yet."""
    path = folder / NEXT_KEY_FILE
    if not path.exists():
        return
    if load_key(path).public_key() == load_certificate(folder / CERTIFICATE_FILE).public_key():
        path.replace(folder / KEY_FILE)
        durable.sync_folder(folder)


def load(
    folder: Path, now: datetime
) -> tuple[x509.Certificate, x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Read the root's certificate, the intermediate in use and its key.

    Raises:
        IdentityError: the root has not signed yet, or the intermediate has ended, or a file is
            missing or damaged.
    """
    if not (folder / CERTIFICATE_FILE).exists():
        raise IdentityError(
            f"{folder} waits for its intermediate: sign the request on the root's machine "
            "(minga root sign), then: minga coordinator install"
        )
    settle(folder)
    root, intermediate = (
        load_certificate(folder / ROOT_FILE),
        load_certificate(folder / CERTIFICATE_FILE),
    )
    issuer_of(intermediate, root)
    check_not_ended(intermediate, now)
    return root, intermediate, load_key(folder / KEY_FILE)
