"""Chains of an offline root: who is trusted by them, and to do what."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from minga.federation import audit
from minga.federation.audit import AUDITOR, Checkpoint, Entry, Record
from minga.federation.certificates import (
    chain_to_der,
    digest_of_key,
    issuer_of,
    parse_chain,
)
from minga.federation.coordinator.access import Gatekeeper
from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.root import Root
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import (
    AuditError,
    EnrolmentError,
    IdentityError,
)
from minga.federation.identity import (
    CertificateVerifier,
    Identity,
    Role,
    accept_certificate,
    load_identity,
    load_or_create_key,
    make_csr,
    new_key,
    save_identity,
    utc_now,
    verify_certificate,
    verify_chain,
)
from tests.federation.identity.roots import appointed, crafted_authority, member, pem, posing_as

RENEW = "/minga.federation.v1.IdentityService/Renew"
SESSION = "/minga.federation.v1.FederationService/Session"


# -- chains -----------------------------------------------------------------------------------


def test_a_chain_reads_back(first: Authority, tmp_path: Path) -> None:
    """From the wire and from the identity folder; alone, a certificate is a chain of one."""
    identity = member(first)
    assert parse_chain(identity.chain_der) == (identity.certificate, first.certificate)
    assert parse_chain(identity.certificate_der) == (identity.certificate, None)
    folder = tmp_path / "device"
    key = load_or_create_key(folder / "key.pem")
    saved = member(first, key=key)
    save_identity(folder, saved)
    again = load_identity(folder)
    assert (again.certificate, again.intermediate) == (saved.certificate, first.certificate)
    assert again.authority == first.root
    assert again.issuer == first.certificate


@given(st.binary(max_size=300))
def test_garbage_is_no_chain(data: bytes) -> None:
    """Whatever its first bytes say of its length."""
    for garbage in (data, b"\x30" + data, b"\x30\x82" + data):
        with pytest.raises(IdentityError):
            parse_chain(garbage)


def test_the_way_to_the_root_has_one_step_between(
    root: Root, first: Authority, tmp_path: Path
) -> None:
    """No leaf straight from the root, no sub-authority, no leaf by a leaf, no foreign root."""
    now, csr = utc_now(), make_csr(new_key(), "press-7")
    by_root = Authority(certificate=root.certificate, key=root.key)
    leaf = by_root.issue_client(Role.DEVICE, "press-7", csr)
    below = crafted_authority(first.key, first.certificate)
    by_device = member(first)
    as_authority = crafted_authority(root.key, root.certificate, is_authority=False)
    long_path = crafted_authority(root.key, root.certificate, path_length=1)
    elsewhere = crafted_authority(root.key, root.certificate, domain="elsewhere")
    foreign = appointed(tmp_path / "foreign", Root.create(tmp_path / "foreign-root", ""))
    cases: dict[str, tuple[x509.Certificate, x509.Certificate | None]] = {
        "came without the intermediate": (leaf, None),
        "may not issue certificates for others": (
            as_authority.issue_client(Role.DEVICE, "press-7", csr),
            as_authority.certificate,
        ),
        "may not issue certificates for others ": (
            long_path.issue_client(Role.DEVICE, "press-7", csr),
            long_path.certificate,
        ),
        "the intermediate certificate was not issued by": (
            below.issue_client(Role.DEVICE, "press-7", csr),
            below.certificate,
        ),
        "the intermediate certificate was not issued by ": (
            posing_as(by_device, first).issue_client(Role.DEVICE, "press-8", csr),
            by_device.certificate,
        ),
        "the certificate was not issued by": (member(foreign).certificate, first.certificate),
        "the intermediate certificate was not issued by  ": (
            member(foreign).certificate,
            foreign.certificate,
        ),
        "for trust domain 'elsewhere'": (
            elsewhere.issue_client(Role.DEVICE, "press-7", csr),
            elsewhere.certificate,
        ),
    }
    for message, (certificate, intermediate) in cases.items():
        with pytest.raises(IdentityError, match=message.strip()):
            verify_chain(chain_to_der(certificate, intermediate), root.certificate, now)
    with pytest.raises(IdentityError):
        verify_chain(member(first).chain_der + pem(first.certificate), root.certificate, now)
    issuer, principal = verify_chain(member(first).chain_der, root.certificate, now)
    assert (issuer, principal.name) == (first.certificate, "press-7")


def test_without_an_offline_root_there_are_no_intermediates(
    authority: Authority, first: Authority
) -> None:
    """A self-signed authority's path length is 0, and ours holds to that."""
    with pytest.raises(IdentityError, match="has no intermediates"):
        issuer_of(first.certificate, authority.certificate)
    below = crafted_authority(authority.key, authority.certificate)
    csr = make_csr(new_key(), "press-7")
    leaf = below.issue_client(Role.DEVICE, "press-7", csr)
    with pytest.raises(IdentityError, match="has no intermediates"):
        verify_chain(chain_to_der(leaf, below.certificate), authority.certificate, utc_now())


def test_an_expired_intermediate_takes_its_leaves_along(root: Root) -> None:
    """Also a leaf that a thief gave a longer life."""
    thief = crafted_authority(root.key, root.certificate, age=timedelta(days=2))
    key = new_key()
    builder = member(thief).certificate
    leaf = (
        x509.CertificateBuilder(
            issuer_name=builder.issuer,
            subject_name=builder.subject,
            public_key=key.public_key(),
            serial_number=9,
            not_valid_before=utc_now() - timedelta(days=1),
            not_valid_after=utc_now() + timedelta(days=1),
            extensions=list(builder.extensions),
        )
    ).sign(thief.key, hashes.SHA256())
    der = leaf.public_bytes(Encoding.DER)
    with pytest.raises(IdentityError, match="the authority's certificate expired"):
        verify_certificate(der, thief.certificate, utc_now())
    with pytest.raises(IdentityError, match="the authority's certificate expired"):
        verify_chain(chain_to_der(leaf, thief.certificate), root.certificate, utc_now())


def test_signatures_count_under_the_newest_intermediate_alone(
    first: Authority, second: Authority
) -> None:
    """Devices check each other's keys by it: invented peers of a thief are refused."""
    invented, real = member(first, "press-8"), member(second, "press-8")
    verifier = CertificateVerifier(authority=member(second).issuer)
    verifier.verify("press-8", real.certificate_der, real.sign(b"advert"), b"advert")
    with pytest.raises(IdentityError, match="not issued by"):
        verifier.verify("press-8", invented.certificate_der, invented.sign(b"advert"), b"advert")


def test_a_device_goes_on_to_newer_intermediates_only(
    root: Root, first: Authority, second: Authority
) -> None:
    """Whatever a coordinator answers: never back, and never to another of the same number."""
    key = new_key()

    def answer(authority: Authority, known: Authority) -> Identity:
        return accept_certificate(
            member(authority, key=key).chain_der,
            key,
            expected=(Role.DEVICE, "press-7"),
            authority=root.certificate,
            issuer=known.certificate,
            now=utc_now(),
        )

    assert answer(first, first).issuer == first.certificate
    assert answer(second, first).issuer == second.certificate
    with pytest.raises(IdentityError, match="replaced by 2; it may be a thief's"):
        answer(first, second)
    twin = crafted_authority(root.key, root.certificate, serial_number=2)
    with pytest.raises(IdentityError, match="replaced by 2"):
        answer(twin, second)


def test_tokens_bring_root_and_intermediate(first: Authority, second: Authority) -> None:
    """So a new device trusts no intermediate that was replaced before its token was made."""

    def token(root: bytes, intermediate: bytes) -> EnrolmentToken:
        made = EnrolmentToken(
            enrol_address="a:1",
            device_address="a:2",
            secret=bytes(32),
            authority_der=root,
            intermediate_der=intermediate,
        )
        return EnrolmentToken.parse(made.to_text())

    good = token(second.pinned_der, second.intermediate_der)
    assert (good.authority, good.issuer) == (second.root, second.certificate)
    for root, intermediate in (
        (first.pinned_der, b""),
        (first.intermediate_der, b""),
        (first.intermediate_der, second.intermediate_der),
    ):
        if (root, intermediate) == (first.intermediate_der, b""):
            continue  # pins the intermediate alone: an authority of path length 0 like any other
        with pytest.raises(EnrolmentError, match="pins no authority"):
            token(root, intermediate)


# -- the gate ---------------------------------------------------------------------------------


def test_a_replaced_intermediate_opens_renewal_alone(
    root: Root, first: Authority, second: Authority
) -> None:
    """And for the key that enrolled: whoever has the intermediate has names, but not that key."""
    device, thief = member(first), member(first)
    gatekeeper = Gatekeeper(
        authority=second.certificate,
        is_revoked=lambda principal: principal.name == "press-9",
        root=root.certificate,
        key_on_record=lambda name: digest_of_key(device.key.public_key()),
    )

    def admit(identity: Identity, method: str) -> None:
        assert identity.intermediate is not None
        gatekeeper.admit(method, pem(identity.certificate), pem(identity.intermediate))

    admit(device, RENEW)
    with pytest.raises(IdentityError, match="renew the certificate first"):
        admit(device, SESSION)
    with pytest.raises(IdentityError, match="a key that never enrolled"):
        admit(thief, RENEW)
    with pytest.raises(IdentityError, match="was revoked"):
        admit(member(first, "press-9", key=device.key), RENEW)
    with pytest.raises(IdentityError, match="not issued by"):
        gatekeeper.admit(RENEW, pem(device.certificate))
    operator = member(first, "operator", Role.OPERATOR)
    for method in (RENEW, "/minga.federation.v1.OperatorService/CreateToken"):
        with pytest.raises(IdentityError):
            admit(operator, method)
    admit(member(second), SESSION)


def test_a_coordinator_that_is_behind_its_devices_says_so(
    root: Root, first: Authority, second: Authority
) -> None:
    """Somebody restored an older state folder."""
    device = member(second)
    gatekeeper = Gatekeeper(
        authority=first.certificate,
        is_revoked=lambda _: False,
        root=root.certificate,
        key_on_record=lambda _: digest_of_key(device.key.public_key()),
    )
    with pytest.raises(IdentityError, match=r"knows intermediate 2 .* has 1; install the newest"):
        gatekeeper.admit(RENEW, pem(device.certificate), pem(second.certificate))


# -- the audit log ----------------------------------------------------------------------------


def log_signed_by(*signers: Identity) -> list[Record]:
    """Make a log with one entry and one checkpoint of each signer."""
    records: list[Record] = []
    previous, last = audit.NOTHING, 0
    for number, signer in enumerate(signers):
        entry = Entry.following(
            number, previous, time=utc_now(), kind="test", subject="x", details={}
        )
        previous = entry.hash
        checkpoint = Checkpoint.signed(
            signer, sequence=number + 1, digest=entry.hash, time=utc_now(), previous=last
        )
        last = number + 1
        records += [entry, checkpoint]
    return records


def test_the_root_alone_verifies_the_audit_log(
    root: Root, first: Authority, second: Authority, tmp_path: Path
) -> None:
    """Over a replacement; but a replaced intermediate signs no later entry."""
    one = member(first, AUDITOR, Role.SERVICE)
    two = member(second, AUDITOR, Role.SERVICE)
    assert audit.verify(log_signed_by(one, one, two), root.certificate).signed_until == 3
    with pytest.raises(AuditError, match="replaced before"):
        audit.verify(log_signed_by(one, two, one), root.certificate)
    foreign = appointed(tmp_path / "foreign", Root.create(tmp_path / "foreign-root", ""))
    with pytest.raises(AuditError, match="not issued by"):
        audit.verify(log_signed_by(member(foreign, AUDITOR, Role.SERVICE)), root.certificate)
