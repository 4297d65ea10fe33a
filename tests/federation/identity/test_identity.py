"""Names, certificates, signatures and the identity folder."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from minga.federation.coordinator.authority import Authority
from minga.federation.errors import IdentityError
from minga.federation.identity import (
    CERTIFICATE_FILE,
    KEY_FILE,
    CertificateVerifier,
    Identity,
    Role,
    holds_identity,
    is_name,
    load_identity,
    load_or_create_key,
    make_csr,
    new_key,
    principal_of,
    save_identity,
    spiffe_uri,
    utc_now,
    verify_certificate,
)

Issue = Callable[..., Identity]

URI = x509.UniformResourceIdentifier
GOOD_URI = URI("spiffe://minga/device/press-7")


def crafted(
    issuer: Authority,
    names: list[x509.GeneralName] | None,
    *,
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    is_authority: bool = False,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> x509.Certificate:
    """Sign what the authority itself never would."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "press-7")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject)
        .public_key((key or new_key()).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc_now() - timedelta(minutes=1))
        .not_valid_after(utc_now() + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, False, False, False, False),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer.key, hashes.SHA256())


def der(certificate: x509.Certificate) -> bytes:
    """Give a certificate as it goes over the wire."""
    return certificate.public_bytes(serialization.Encoding.DER)


# -- names ------------------------------------------------------------------------------------


@given(st.text(max_size=80))
def test_every_possible_name_makes_a_uri_that_reads_back(text: str) -> None:
    """A text is either no name, or its URI has exactly three slash-separated parts."""
    if is_name(text):
        uri = spiffe_uri("minga", Role.DEVICE, text)
        assert uri.removeprefix("spiffe://").split("/") == ["minga", "device", text]


@pytest.mark.parametrize(
    "name", ["", "-a", "A", "a_b", "a/b", "a b", "a\n", "é", "a" * 64, "a.b", "..", "\u0430"]
)
def test_a_name_is_one_lower_case_dns_label(name: str) -> None:
    """Anything that could mean something else in a path, a URI or a terminal is no name."""
    assert not is_name(name)


ODD_NAMES: dict[str, list[x509.GeneralName] | None] = {
    "no names": None,
    "two URIs": [GOOD_URI, URI("spiffe://minga/operator/root")],
    "a DNS name beside": [GOOD_URI, x509.DNSName("press-7")],
    "a DNS name alone": [x509.DNSName("press-7")],
    "unknown role": [URI("spiffe://minga/admin/press-7")],
    "upper case role": [URI("spiffe://minga/DEVICE/press-7")],
    "upper case name": [URI("spiffe://minga/device/Press")],
    "empty name": [URI("spiffe://minga/device/")],
    "longer path": [URI("spiffe://minga/device/press-7/operator")],
    "dots": [URI("spiffe://minga/device/..")],
    "escaped": [URI("spiffe://minga/device/press%2d7")],
    "query": [URI("spiffe://minga/device/press-7?role=operator")],
    "line break": [URI("spiffe://minga/device/press-7\n")],
    "user": [URI("spiffe://root@minga/device/press-7")],
    "other scheme": [URI("https://minga/device/press-7")],
    "no trust domain": [URI("spiffe:///device/press-7")],
    "name too long": [URI("spiffe://minga/device/" + "a" * 64)],
}


@pytest.mark.parametrize("names", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_an_oddly_named_certificate_is_nobody(
    authority: Authority, names: list[x509.GeneralName] | None
) -> None:
    """Even signed by the authority, it is refused unless it has one URI of our form alone."""
    certificate = crafted(authority, names)
    with pytest.raises(IdentityError):
        principal_of(certificate)
    with pytest.raises(IdentityError):
        verify_certificate(der(certificate), authority.certificate, utc_now())


# -- certificates -----------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_an_issued_certificate_verifies(authority: Authority, issue: Issue, role: Role) -> None:
    """Role, name and serial number are the certificate's."""
    identity = issue("a-1", role)
    principal = verify_certificate(identity.certificate_der, authority.certificate, utc_now())
    assert (principal.role, principal.name) == (role, "a-1")
    assert principal.serial == identity.certificate.serial_number
    assert str(principal) == f"{role} 'a-1'"


def test_a_foreign_certificate_is_refused(
    authority: Authority, foreign_authority: Authority, issue: Issue
) -> None:
    """The other authority has the same name and trust domain; only its key tells."""
    identity = issue(issuer=foreign_authority)
    with pytest.raises(IdentityError, match="not issued by this federation's authority"):
        verify_certificate(identity.certificate_der, authority.certificate, utc_now())


@pytest.mark.parametrize(
    ("shift", "message"),
    [(timedelta(days=31), "expired on"), (timedelta(minutes=-6), "check this machine's clock")],
)
def test_a_certificate_holds_for_its_time_only(
    authority: Authority, issue: Issue, shift: timedelta, message: str
) -> None:
    """Before and after, the message says which."""
    identity = issue()
    with pytest.raises(IdentityError, match=message):
        verify_certificate(identity.certificate_der, authority.certificate, utc_now() + shift)


def test_a_late_clock_is_tolerated(authority: Authority, issue: Issue) -> None:
    """Certificates start five minutes before they are issued."""
    now = utc_now() - timedelta(minutes=4)
    verify_certificate(issue().certificate_der, authority.certificate, now)


def test_certificates_for_other_ends_are_refused(authority: Authority) -> None:
    """What is a server's, an authority's, of another trust domain or of an RSA key."""
    rsa_key = rsa.generate_private_key(65537, 2048)
    cases = {
        "not for clients": crafted(authority, [GOOD_URI], purpose=ExtendedKeyUsageOID.SERVER_AUTH),
        "is not for clients": crafted(authority, [GOOD_URI], is_authority=True),
        "trust domain 'other'": crafted(authority, [URI("spiffe://other/device/press-7")]),
        "not a P-256 key": crafted(authority, [GOOD_URI], key=rsa_key),
    }
    for message, certificate in cases.items():
        with pytest.raises(IdentityError, match=message):
            verify_certificate(der(certificate), authority.certificate, utc_now())
    with pytest.raises(IdentityError, match=r"does not say what it is for|names no holder"):
        verify_certificate(authority.pinned_der, authority.certificate, utc_now())


@pytest.mark.parametrize("garbage", [b"", b"\x30", b"\x00" * 100, b"\x30\x82" * 4000])
def test_garbage_is_no_certificate(authority: Authority, garbage: bytes) -> None:
    """Bytes of any kind and length give a typed error."""
    with pytest.raises(IdentityError, match=r"no X\.509 certificate|larger than"):
        verify_certificate(garbage, authority.certificate, utc_now())


# -- signatures -------------------------------------------------------------------------------


def test_a_device_s_signature_is_its_own(authority: Authority, issue: Issue) -> None:
    """It holds for the message and the device, and for nothing else."""
    verifier = CertificateVerifier(authority=authority.certificate)
    seven, eight = issue("press-7"), issue("press-8")
    signature = seven.sign(b"advert")
    verifier.verify("press-7", seven.certificate_der, signature, b"advert")
    attacks = [
        ("press-7", seven.certificate_der, signature, b"another advert"),
        ("press-8", seven.certificate_der, signature, b"advert"),
        ("press-8", eight.certificate_der, signature, b"advert"),
        ("press-7", seven.certificate_der, signature[:-1], b"advert"),
        ("press-7", seven.certificate_der, b"", b"advert"),
        ("press-7", b"", signature, b"advert"),
    ]
    for attack in attacks:
        with pytest.raises(IdentityError):
            verifier.verify(*attack)


def test_a_signature_made_elsewhere_with_the_key_does_not_count(
    authority: Authority, issue: Issue
) -> None:
    """Signatures are bound to their use by a prefix."""
    identity = issue()
    bare = identity.key.sign(b"advert", ec.ECDSA(hashes.SHA256()))
    with pytest.raises(IdentityError, match="not by device"):
        CertificateVerifier(authority=authority.certificate).verify(
            "press-7", identity.certificate_der, bare, b"advert"
        )


def test_signatures_of_operators_and_of_the_expired_do_not_count(
    authority: Authority, issue: Issue
) -> None:
    """Only a device whose certificate holds by the verifier's clock may advertise keys."""
    operator = issue("press-7", Role.OPERATOR)
    verifier = CertificateVerifier(authority=authority.certificate)
    with pytest.raises(IdentityError, match="of operator"):
        verifier.verify("press-7", operator.certificate_der, operator.sign(b"m"), b"m")
    device = issue("press-7")
    later = CertificateVerifier(
        authority=authority.certificate, clock=lambda: utc_now() + timedelta(days=31)
    )
    with pytest.raises(IdentityError, match="expired"):
        later.verify("press-7", device.certificate_der, device.sign(b"m"), b"m")


# -- the folder -------------------------------------------------------------------------------


def saved(folder: Path, authority: Authority) -> Identity:
    """Enrol into a folder without a network."""
    key = load_or_create_key(folder / KEY_FILE)
    certificate = authority.issue_client(Role.DEVICE, "press-7", make_csr(key, "press-7"))
    identity = Identity.of(key, certificate, authority.certificate)
    save_identity(folder, identity)
    return identity


def test_an_identity_reads_back(tmp_path: Path, authority: Authority) -> None:
    """Name, role and certificate survive, and the key signs as before."""
    folder = tmp_path / "device"
    assert not holds_identity(folder)
    identity = saved(folder, authority)
    again = load_identity(folder)
    assert (again.device_id, again.role) == ("press-7", Role.DEVICE)
    assert again.certificate == identity.certificate
    CertificateVerifier(authority=authority.certificate).verify(
        "press-7", again.certificate_der, again.sign(b"m"), b"m"
    )


def test_the_key_is_readable_by_its_owner_alone(tmp_path: Path, authority: Authority) -> None:
    """Whatever the umask, and no temporary file is left."""
    for umask in (0o000, 0o277):
        former = os.umask(umask)
        try:
            folder = tmp_path / f"{umask:o}"
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)
            load_or_create_key(folder / KEY_FILE)
        finally:
            os.umask(former)
        assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
        assert [path.name for path in folder.iterdir()] == [KEY_FILE]


def test_a_key_is_made_once(tmp_path: Path) -> None:
    """Of many that make it at once, all get the same one."""
    path = tmp_path / "new" / KEY_FILE
    with ThreadPoolExecutor(16) as pool:
        keys = list(pool.map(load_or_create_key, [path] * 16))
    assert len({key.private_numbers().private_value for key in keys}) == 1


def test_an_identity_does_not_overwrite_another_key(tmp_path: Path, authority: Authority) -> None:
    """A certificate for another key is refused and the folder stays as it was."""
    saved(tmp_path / "a", authority)
    other = saved(tmp_path / "b", authority)
    before = (tmp_path / "a" / CERTIFICATE_FILE).read_bytes()
    with pytest.raises(IdentityError, match="another identity"):
        save_identity(tmp_path / "a", other)
    assert (tmp_path / "a" / CERTIFICATE_FILE).read_bytes() == before


def test_a_damaged_folder_is_told(tmp_path: Path, authority: Authority) -> None:
    """Each missing, damaged or swapped file gives an error, which never quotes the key."""
    with pytest.raises(IdentityError, match="enrol first"):
        load_identity(tmp_path / "empty")
    folder = tmp_path / "device"
    identity = saved(folder, authority)
    secret = identity.key_pem().splitlines()[1]
    (folder / KEY_FILE).write_bytes(secret)
    with pytest.raises(IdentityError) as caught:
        load_identity(folder)
    assert secret.decode() not in str(caught.value)
    (folder / KEY_FILE).unlink()
    with pytest.raises(IdentityError, match="cannot read the key"):
        load_identity(folder)
    load_or_create_key(folder / KEY_FILE)
    with pytest.raises(IdentityError, match="belongs to another key"):
        load_identity(folder)
    (folder / CERTIFICATE_FILE).write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(IdentityError, match="cannot read the certificate"):
        load_identity(folder)


def test_a_key_of_another_kind_is_told(tmp_path: Path) -> None:
    """The file may hold a valid key that is not ours."""
    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / KEY_FILE).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(IdentityError, match="not a P-256 key"):
        load_or_create_key(tmp_path / KEY_FILE)


def test_an_identity_may_be_logged(issue: Issue) -> None:
    """Its representation holds no key."""
    text = repr(issue())
    assert "key" not in text.lower()
    assert "press-7" in text
