"""Offline roots and what hangs by them, good and crafted, for tests."""

from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from minga.federation.coordinator import intermediate as intermediates
from minga.federation.coordinator.authority import Authority, authority_builder, common_name
from minga.federation.coordinator.root import Root
from minga.federation.identity import (
    Identity,
    Role,
    make_csr,
    new_key,
    utc_now,
)


def appointed(folder: Path, root: Root, lifetime: timedelta = timedelta(days=365)) -> Authority:
    """Hold the ceremony in a folder."""
    csr = intermediates.request(folder, root.certificate, utc_now())
    intermediates.install(folder, root.sign(csr, lifetime), utc_now())
    return Authority.open(folder)


def member(
    authority: Authority,
    name: str = "press-7",
    role: Role = Role.DEVICE,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> Identity:
    """Make somebody of the federation."""
    key = key or new_key()
    return authority.identity_of(key, authority.issue_client(role, name, make_csr(key, name)))


def pem(certificate: x509.Certificate) -> bytes:
    """Give a certificate as gRPC tells it."""
    return certificate.public_bytes(Encoding.PEM)


def crafted_authority(
    signer: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate,
    *,
    domain: str = "minga",
    path_length: int = 0,
    serial_number: int = 7,
    is_authority: bool = True,
    age: timedelta = timedelta(0),
    key: ec.EllipticCurvePrivateKey | None = None,
    name: str = "crafted",
) -> Authority:
    """Make an intermediate, or what poses as one, that no root of ours would sign."""
    key = key or new_key()
    builder = authority_builder(
        common_name(name),
        key.public_key(),
        domain,
        path_length=path_length,
        serial_number=serial_number,
    )
    if not is_authority:
        builder = x509.CertificateBuilder(
            subject_name=common_name(name),
            public_key=key.public_key(),
            serial_number=serial_number,
        )
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]),
            critical=False,
        )
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        builder = builder.add_extension(usage, critical=True)
    certificate = (
        builder.issuer_name(issuer.subject)
        .not_valid_before(utc_now() - timedelta(minutes=1) - age)
        .not_valid_after(utc_now() + timedelta(days=1) - age)
        .sign(signer, hashes.SHA256())
    )
    return Authority(certificate=certificate, key=key, root=issuer, clock=lambda: utc_now() - age)


def posing_as(identity: Identity, issuer: Authority) -> Authority:
    """Let a device's key sign as if its certificate were an authority's."""
    return crafted_authority(issuer.key, issuer.certificate, key=identity.key, name=identity.name)
