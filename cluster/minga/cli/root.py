"""`minga root`: the authority of a federation on a machine of its own."""

from datetime import datetime
from pathlib import Path

from cyclopts import App

from minga.cli.output import print_line

app = App(name="root", help="Keep a federation's root authority on an offline machine.")


@app.command
def create(
    *,
    folder: Path = Path("root"),
    trust_domain: str = "minga",
    passphrase_file: Path | None = None,
    no_passphrase: bool = False,
) -> None:
    """Make a root authority on this machine; its key stays in the folder.

    Devices trust `root.pem` from their enrolment on. The key signs the intermediates that the
    coordinator issues certificates with, and is needed for nothing else: keep the folder, and a
    copy of it in another place, away from every network.

    Example: minga root create --folder /media/vault/root

    Args:
        folder: Where key, certificate and the list of what was signed are kept.
        trust_domain: The federation's name in all its certificates: a-z, 0-9, '-' and '.'.
        passphrase_file: A file whose first line is the passphrase; the default is to ask for it.
        no_passphrase: Leave the key unencrypted.
    """
    from minga.federation.coordinator.root import Root, fingerprint

    passphrase = "" if no_passphrase else _passphrase(passphrase_file, is_new=True)
    root = Root.create(folder, passphrase, trust_domain=trust_domain)
    print_line(f"root         {folder / 'root.pem'}, for the coordinator's machine")
    print_line(f"fingerprint  {fingerprint(root.certificate)}")
    print_line(f"valid until  {_day(root.certificate.not_valid_after_utc)}")


@app.command
def sign(
    request: Path,
    intermediate: Path,
    *,
    folder: Path = Path("root"),
    days: float = 365.0,
    passphrase_file: Path | None = None,
) -> None:
    """Sign what `minga coordinator request` wrote: an intermediate that issues certificates.

    Each has a number, higher than all before. A device that has seen it refuses whatever an earlier
    one issued: so a coordinator that was stolen is locked out.

    Example: minga root sign /media/stick/request.pem /media/stick/intermediate.pem

    Args:
        request: The signing request.
        intermediate: Where to write the certificate, for `minga coordinator install`.
        folder: The root's folder.
        days: How long it holds; no certificate that it issues holds longer.
        passphrase_file: A file whose first line is the passphrase; the default is to ask for it.
    """
    from datetime import timedelta

    from cryptography.hazmat.primitives.serialization import Encoding

    from minga.federation.coordinator.intermediate import read_request
    from minga.federation.coordinator.root import Root, fingerprint, is_encrypted
    from minga.federation.durable import replace_file
    from minga.federation.errors import FederationError

    if not 1 <= days <= 3650:
        raise FederationError(f"an intermediate holds 1 to 3650 days, got {days:g}")
    csr = read_request(request)
    passphrase = _passphrase(passphrase_file, is_new=False) if is_encrypted(folder) else ""
    root = Root.open(folder, passphrase)
    certificate = root.sign(csr, timedelta(days=days))
    try:
        replace_file(intermediate, certificate.public_bytes(Encoding.PEM))
    except OSError as error:
        raise FederationError(
            f"cannot write {intermediate} ({error.strerror}); the certificate is in "
            f"{root.path_of(certificate.serial_number)}"
        ) from error
    print_line(f"intermediate {certificate.serial_number}  {intermediate}")
    print_line(f"fingerprint  {fingerprint(certificate)}")
    print_line(f"valid until  {_day(certificate.not_valid_after_utc)}")


def _passphrase(file: Path | None, *, is_new: bool) -> str:
    """Read the passphrase from a file, or ask for it; a new one twice."""
    import sys
    from getpass import getpass

    from minga.federation.errors import IdentityError

    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise IdentityError(f"cannot read the passphrase from {file} ({error})") from error
        passphrase = lines[0] if lines else ""
    elif sys.stdin.isatty():
        passphrase = getpass("passphrase of the root: ")
        if is_new and getpass("the same again: ") != passphrase:
            raise IdentityError("the two are not the same; begin again")
    else:
        raise IdentityError("there is no terminal to ask for a passphrase; give --passphrase-file")
    if not passphrase:
        raise IdentityError("the passphrase is empty; --no-passphrase leaves the key unencrypted")
    return passphrase


def _day(end: datetime) -> str:
    return f"{end:%Y-%m-%d}"
