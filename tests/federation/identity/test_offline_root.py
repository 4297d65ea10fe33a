"""The offline root's folder, and the coordinator's under it."""

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID

from minga.federation.certificates import (
    is_offline_root,
    trust_domain_of,
)
from minga.federation.coordinator import intermediate as intermediates
from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.credentials import OwnIdentity
from minga.federation.coordinator.root import KEY_FILE, Root, is_encrypted, numbers_signed
from minga.federation.errors import (
    EnrolmentError,
    IdentityError,
)
from minga.federation.identity import (
    Role,
    load_identity,
    make_csr,
    new_key,
    utc_now,
)
from tests.federation.identity.roots import appointed, member, pem

PASSPHRASE = "seven press shops in a row"


# -- the root's folder ------------------------------------------------------------------------


def test_the_root_s_key_is_encrypted_at_rest(tmp_path: Path) -> None:
    """Only the passphrase opens it; file and messages hold neither key nor passphrase."""
    root = Root.create(tmp_path / "root", PASSPHRASE)
    path = tmp_path / "root" / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert is_encrypted(tmp_path / "root")
    secret = root.key.private_numbers().private_value.to_bytes(32, "big")
    assert secret not in path.read_bytes()
    for wrong in ("", "seven press shops in a ro"):
        with pytest.raises(IdentityError, match="passphrase is wrong") as caught:
            Root.open(tmp_path / "root", wrong)
        assert PASSPHRASE not in str(caught.value)
    again = Root.open(tmp_path / "root", PASSPHRASE)
    assert again.key.private_numbers() == root.key.private_numbers()
    assert "key=" not in repr(again)
    # A common format: whoever keeps the file needs no Minga to read it.
    key, _, _ = pkcs12.load_key_and_certificates(path.read_bytes(), PASSPHRASE.encode())
    assert key is not None


def test_a_root_is_made_once(root: Root) -> None:
    """A second one in its folder would orphan a fleet."""
    before = (root.folder / KEY_FILE).read_bytes()
    with pytest.raises(IdentityError, match="holds a root already"):
        Root.create(root.folder, "")
    assert (root.folder / KEY_FILE).read_bytes() == before
    assert Root.open(root.folder).certificate == root.certificate


def test_what_the_root_refuses(root: Root, tmp_path: Path) -> None:
    """Short passphrases, odd domains, damaged requests and folders."""
    with pytest.raises(IdentityError, match="at least 12 characters"):
        Root.create(tmp_path / "short", "short")
    with pytest.raises(ValueError, match="trust domain"):
        Root.create(tmp_path / "odd", "", trust_domain="Minga Inc.")
    with pytest.raises(EnrolmentError, match="cannot be read"):
        root.sign(b"no request")
    assert numbers_signed(root.folder) == []
    with pytest.raises(IdentityError, match="no root in"):
        is_encrypted(tmp_path / "nothing")
    (root.folder / "root.pem").write_bytes(pem(Authority.open(tmp_path / "own").certificate))
    with pytest.raises(IdentityError, match="no offline root's certificate"):
        Root.open(root.folder)


def test_intermediates_are_numbered_and_limited(root: Root) -> None:
    """They count up over restarts, end in time, sign no authority, and name one trust domain."""
    csr = make_csr(new_key(), "x")
    signed = [root.sign(csr), Root.open(root.folder).sign(csr, timedelta(days=9999))]
    assert [certificate.serial_number for certificate in signed] == [1, 2]
    assert numbers_signed(root.folder) == [1, 2]
    for certificate in signed:
        extensions = certificate.extensions
        basic = extensions.get_extension_for_class(x509.BasicConstraints)
        assert basic.critical
        assert (basic.value.ca, basic.value.path_length) == (True, 0)
        names = extensions.get_extension_for_class(x509.NameConstraints)
        assert names.critical
        assert names.value.permitted_subtrees == [x509.UniformResourceIdentifier("minga")]
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(purposes) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
        assert trust_domain_of(certificate) == trust_domain_of(root.certificate) == "minga"
    assert signed[1].not_valid_after_utc == root.certificate.not_valid_after_utc
    assert signed[0].not_valid_after_utc - utc_now() < timedelta(days=366)
    assert is_offline_root(root.certificate)
    assert not is_offline_root(signed[0])


# -- the coordinator's folder -----------------------------------------------------------------


def test_a_folder_that_waits_for_the_root_starts_no_authority_of_its_own(
    root: Root, tmp_path: Path
) -> None:
    """Devices would pin it."""
    intermediates.request(tmp_path / "authority", root.certificate, utc_now())
    with pytest.raises(IdentityError, match="minga coordinator install"):
        Authority.open(tmp_path / "authority")


def test_a_federation_keeps_its_authority(root: Root, tmp_path: Path) -> None:
    """One with its own goes on as ever; none changes its root."""
    own = Authority.open(tmp_path / "own")
    with pytest.raises(IdentityError, match="an authority of its own"):
        intermediates.request(tmp_path / "own", root.certificate, utc_now())
    assert Authority.open(tmp_path / "own").certificate == own.certificate
    with pytest.raises(IdentityError, match="waits for no intermediate"):
        intermediates.install(tmp_path / "own", own.certificate, utc_now())
    appointed(tmp_path / "first", root)
    other = Root.create(tmp_path / "other", "")
    with pytest.raises(IdentityError, match="another root"):
        intermediates.request(tmp_path / "first", other.certificate, utc_now())
    with pytest.raises(IdentityError, match="no offline root's"):
        intermediates.request(tmp_path / "new", own.certificate, utc_now())


def test_only_the_answer_to_the_newest_request_is_installed(root: Root, tmp_path: Path) -> None:
    """Not another key's, another root's, an older one, or one that has ended."""
    folder = tmp_path / "authority"
    void = intermediates.request(folder, root.certificate, utc_now())
    csr = intermediates.request(folder, root.certificate, utc_now())
    with pytest.raises(IdentityError, match="newest request"):
        intermediates.install(folder, root.sign(void), utc_now())
    other = Root.create(tmp_path / "other", "")
    with pytest.raises(IdentityError, match="not issued by this federation's authority"):
        intermediates.install(folder, other.sign(csr), utc_now())
    second, third = root.sign(csr), root.sign(csr)
    with pytest.raises(IdentityError, match="expired"):
        intermediates.install(folder, third, utc_now() + timedelta(days=400))
    intermediates.install(folder, third, utc_now())
    intermediates.install(folder, third, utc_now())
    assert Authority.open(folder).certificate == third
    with pytest.raises(IdentityError, match="not newer than 3"):
        intermediates.install(folder, second, utc_now())


def test_a_crash_while_installing_heals(root: Root, tmp_path: Path) -> None:
    """The certificate is in place, its key not yet."""
    folder = tmp_path / "authority"
    appointed(folder, root)
    csr = intermediates.request(folder, root.certificate, utc_now())
    assert Authority.open(folder).certificate.serial_number == 1
    certificate = root.sign(csr)
    (folder / intermediates.CERTIFICATE_FILE).write_bytes(pem(certificate))
    authority = Authority.open(folder)
    assert authority.certificate == certificate
    assert authority.key.public_key() == certificate.public_key()
    assert not (folder / intermediates.NEXT_KEY_FILE).exists()


def test_an_intermediate_that_ended_issues_no_more(root: Root, tmp_path: Path) -> None:
    """The coordinator says what to do instead of issuing what nobody takes."""
    appointed(tmp_path / "authority", root, timedelta(days=10))
    with pytest.raises(IdentityError, match=r"expired on .*; the coordinator's operator"):
        Authority.open(tmp_path / "authority", clock=lambda: utc_now() + timedelta(days=11))


def test_leaves_end_with_their_intermediate(root: Root, tmp_path: Path) -> None:
    """A client's and a server's."""
    authority = appointed(tmp_path / "authority", root, timedelta(days=10))
    ends = (
        member(authority).certificate.not_valid_after_utc,
        authority.issue_server(["127.0.0.1"]).certificate.not_valid_after_utc,
    )
    assert set(ends) == {authority.certificate.not_valid_after_utc}


def test_the_coordinator_s_own_keys_change_with_the_intermediate(
    first: Authority, second: Authority, tmp_path: Path
) -> None:
    """Who stole the intermediate's key has the operator's too; a restart alone keeps it."""
    own = OwnIdentity(first, tmp_path / "operator", Role.OPERATOR, "operator").current()
    same = OwnIdentity(first, tmp_path / "operator", Role.OPERATOR, "operator").current()
    assert same.key.public_key() == own.key.public_key()
    other = OwnIdentity(second, tmp_path / "operator", Role.OPERATOR, "operator").current()
    assert other.key.public_key() != own.key.public_key()
    assert load_identity(tmp_path / "operator").intermediate == second.certificate
