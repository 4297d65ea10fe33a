"""What the authority issues, to whom, and what it remembers."""

import ipaddress
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from minga.federation.certificates import trust_domain_of
from minga.federation.coordinator.authority import (
    CERTIFICATE_FILE,
    KEY_FILE,
    Authority,
    Lifetimes,
)
from minga.federation.errors import EnrolmentError, IdentityError
from minga.federation.identity import (
    Role,
    make_csr,
    new_key,
    utc_now,
)


def test_an_authority_is_made_once(tmp_path: Path) -> None:
    """Opened again it has the same key and certificate, and the key file is private."""
    first = Authority.open(tmp_path / "state", trust_domain="plant.example")
    again = Authority.open(tmp_path / "state")
    assert again.certificate == first.certificate
    assert trust_domain_of(again.certificate) == "plant.example"
    assert stat.S_IMODE((tmp_path / "state" / KEY_FILE).stat().st_mode) == 0o600


def test_two_starts_at_once_make_one_authority(tmp_path: Path) -> None:
    """Whoever loses the race uses the winner's files."""
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(Authority.open, [tmp_path / "state"] * 8))
    assert len({authority.certificate for authority in opened}) == 1


def test_a_crash_between_key_and_certificate_heals(tmp_path: Path) -> None:
    """The key that is there gets its certificate at the next start."""
    first = Authority.open(tmp_path)
    (tmp_path / CERTIFICATE_FILE).unlink()
    again = Authority.open(tmp_path)
    assert again.certificate.public_key() == first.certificate.public_key()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """A certificate of another key would make everything issued worthless."""
    Authority.open(tmp_path / "a")
    Authority.open(tmp_path / "b")
    (tmp_path / "a" / KEY_FILE).write_bytes((tmp_path / "b" / KEY_FILE).read_bytes())
    with pytest.raises(IdentityError, match="does not belong to"):
        Authority.open(tmp_path / "a")


def test_a_trust_domain_has_the_form_of_a_host_name(tmp_path: Path) -> None:
    """Otherwise every certificate would carry a URI that cannot be read back."""
    with pytest.raises(ValueError, match="'a/b'"):
        Authority.open(tmp_path, trust_domain="a/b")


def test_names_come_from_the_caller_never_from_the_request(authority: Authority) -> None:
    """A request that calls itself operator gets the name that the token allowed."""
    key = new_key()
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "root")])
    wish = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier("spiffe://minga/operator/root")]
    )
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(wish, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    csr = request.public_bytes(serialization.Encoding.DER)
    certificate = authority.issue_client(Role.DEVICE, "press-7", csr)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://minga/device/press-7"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.public_key() == key.public_key()


def test_lifetimes_and_serial_numbers(authority: Authority) -> None:
    """Clients get 30 days, five minutes back; serial numbers are large and never repeat."""
    csr = make_csr(new_key(), "press-7")
    issued = [authority.issue_client(Role.DEVICE, "press-7", csr) for _ in range(5)]
    now = utc_now()
    for certificate in issued:
        assert now - timedelta(minutes=6) < certificate.not_valid_before_utc < now
        days = certificate.not_valid_after_utc - now
        assert timedelta(days=29) < days <= timedelta(days=30)
    assert len({certificate.serial_number for certificate in issued}) == 5
    assert min(certificate.serial_number for certificate in issued).bit_length() > 100


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    """A certificate ends with its issuer's, whatever the lifetime."""
    authority = Authority.open(tmp_path, lifetimes=Lifetimes(device=timedelta(days=10_000)))
    certificate = authority.issue_client(Role.DEVICE, "a", make_csr(new_key(), "a"))
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_a_request_must_prove_possession_of_a_p256_key(authority: Authority) -> None:
    """Tampered, foreign-signed, oversized and other kinds of request are refused."""
    good = make_csr(new_key(), "a")
    tampered = bytearray(good)
    tampered[-1] ^= 1
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    big_key, large = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())
    requests = [bytes(tampered), b"", good[:-10], good + b"\x00" * 5000]
    requests += [
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        for key in (big_key, large)
    ]
    for request in requests:
        with pytest.raises(EnrolmentError):
            authority.issue_client(Role.DEVICE, "a", request)


def test_a_server_certificate_names_hosts_and_addresses(authority: Authority) -> None:
    """IP addresses are IP names, the rest DNS names; the key is kept out of the representation."""
    server = authority.issue_server(["coordinator.example", "10.0.0.7", "::1"])
    certificate = x509.load_pem_x509_certificate(server.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.7"),
        ipaddress.ip_address("::1"),
    ]
    assert certificate.not_valid_after_utc - utc_now() > timedelta(days=89)
    assert "PRIVATE" not in repr(server)
    with pytest.raises(ValueError, match="at least one host"):
        authority.issue_server([])
