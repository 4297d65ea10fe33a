"""Renewal over real TLS: the coordinator's decision, and the link that changes its channel."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from minga.federation.audit import AUDITOR, Entry
from minga.federation.certificates import digest_of_key, renewal_time
from minga.federation.coordinator.audit_log import AuditLog, Kind, read_log
from minga.federation.coordinator.authority import Authority, Lifetimes
from minga.federation.coordinator.credentials import OwnIdentity
from minga.federation.coordinator.identity_service import IdentityServicer
from minga.federation.coordinator.rate import Rate
from minga.federation.coordinator.renewal import Renewer
from minga.federation.coordinator.store import Store
from minga.federation.device.link import Link
from minga.federation.errors import (
    EnrolmentError,
    FederationError,
    IdentityError,
    LimitError,
    UnreachableError,
)
from minga.federation.identity import (
    KEY_FILE,
    Identity,
    Principal,
    Role,
    load_identity,
    load_or_create_key,
    make_csr,
    new_key,
    save_identity,
    utc_now,
)
from minga.federation.limits import MAX_RENEWALS_PER_MINUTE
from minga.federation.transport import calling, open_channel
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

Serve = Callable[..., Awaitable[str]]

LIFETIME = timedelta(days=30)
AGE = timedelta(days=26)
"""Older than every renewal time of 30 days, and not expired."""


class Blobs(pb_grpc.BlobServiceServicer):
    """A download whose pieces come when they are let through; each names its caller's serial."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def Download(  # noqa: N802
        self, request: pb.DownloadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadResponse]:
        """Give pieces until an empty one."""
        while piece := await self.pieces.get():
            yield pb.DownloadResponse(chunk=piece)

    async def GetUploadOffset(  # noqa: N802
        self, request: pb.GetUploadOffsetRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetUploadOffsetResponse:
        """Answer with the low bits of the serial number of the caller's certificate."""
        pem = context.auth_context()["x509_pem_cert"][0]
        serial = x509.load_pem_x509_certificate(pem).serial_number
        return pb.GetUploadOffsetResponse(offset=serial % 2**63)


class Office:
    """A coordinator's device port with renewal, and a clock that began `AGE` ago.

    Real TLS looks at the real time, so certificates are issued in the past and renewed now.
    """

    def __init__(self, folder: Path) -> None:
        self.now = utc_now() - AGE
        self.folder = folder
        self.authority = Authority.open(
            folder / "authority", lifetimes=Lifetimes(device=LIFETIME), clock=self.clock
        )
        self.store = Store(folder / "coordinator.db")
        auditor = OwnIdentity(self.authority, folder / AUDITOR, Role.SERVICE, AUDITOR)
        self.audit = AuditLog(self.store, signer=auditor.current, clock=self.clock)
        self.blobs = Blobs()
        self.address = "127.0.0.1:1"
        self.kept: list[Identity] = []

    def clock(self) -> datetime:
        """Give the time."""
        return self.now

    def enrol(self, name: str = "press-7") -> Identity:
        """Make a device with an identity folder."""
        folder = self.folder / name
        key = load_or_create_key(folder / KEY_FILE)
        certificate = self.authority.issue_client(Role.DEVICE, name, make_csr(key, name))
        identity = Identity.of(key, certificate, self.authority.certificate)
        save_identity(folder, identity)
        self.store.register_device(name, "line-3", digest_of_key(key.public_key()), 0.0)
        return identity

    def is_revoked(self, principal: Principal) -> bool:
        """Ask the store."""
        device = self.store.device(principal.name)
        return device is None or device.revoked_at is not None

    async def serve(self, serve: Serve) -> None:
        """Open the port."""

        def add_services(server: grpc.aio.Server) -> None:
            renewer = Renewer(authority=self.authority, key_on_record=self.key_on_record)
            rate = Rate[str](per_minute=MAX_RENEWALS_PER_MINUTE, clock=self.clock)
            servicer = IdentityServicer(renewer, self.audit, rate)
            pb_grpc.add_IdentityServiceServicer_to_server(servicer, server)
            pb_grpc.add_BlobServiceServicer_to_server(self.blobs, server)

        self.address = await serve(
            add_services, issuer=self.authority, is_revoked=self.is_revoked, clock=self.clock
        )

    def key_on_record(self, device_id: str) -> bytes | None:
        """Ask the store."""
        device = self.store.device(device_id)
        return device.key_digest if device else None

    def link(self, identity: Identity, check_interval_s: float = 60.0) -> Link:
        """Link a device; what it keeps is on the disk and in `kept`."""

        def keep(renewed: Identity) -> None:
            save_identity(self.folder / renewed.name, renewed)
            self.kept.append(renewed)

        return Link(
            self.address,
            identity,
            keep=keep,
            clock=self.clock,
            check_interval_s=check_interval_s,
        )

    def entries(self) -> list[Entry]:
        """Read the audit log."""
        records = read_log(self.folder / "coordinator.db")
        return [record for record in records if isinstance(record, Entry)]


@pytest.fixture
async def office(tmp_path: Path, serve: Serve) -> AsyncIterator[Office]:
    """A coordinator that serves."""
    office = Office(tmp_path)
    await office.serve(serve)
    yield office
    office.store.close()


async def serial_seen(link: Link) -> int:
    """Ask the coordinator which certificate the newest channel shows."""
    async with link.channel() as channel:
        stub = pb_grpc.BlobServiceStub(channel)
        return (await stub.GetUploadOffset(pb.GetUploadOffsetRequest())).offset


def low_bits(identity: Identity) -> int:
    """Give what `serial_seen` gives for an identity."""
    return identity.certificate.serial_number % 2**63


# -- when -------------------------------------------------------------------------------------


def test_renewal_comes_after_two_thirds_and_spreads(authority: Authority) -> None:
    """Of 200 certificates each has its own moment between 2/3 and 3/4 of its lifetime."""
    csr = make_csr(new_key(), "press-7")
    shares = []
    for _ in range(200):
        certificate = authority.issue_client(Role.DEVICE, "press-7", csr)
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        shares.append((renewal_time(certificate) - start) / (end - start))
        assert renewal_time(certificate) == renewal_time(certificate)
    assert 2 / 3 <= min(shares) < 0.68
    assert 0.74 < max(shares) <= 3 / 4
    assert len(set(shares)) == 200


async def test_nothing_is_renewed_before_it_is_due(office: Office) -> None:
    """A young certificate asks for nothing."""
    link = office.link(office.enrol())
    office.now += timedelta(days=19)
    await link.renew_if_due()
    assert not office.kept
    assert not office.entries()
    await link.close()


# -- the device's side ------------------------------------------------------------------------


async def test_a_due_certificate_is_renewed(office: Office) -> None:
    """Same name, same key, another certificate: on the disk, on the wire, in the audit log."""
    identity = office.enrol()
    link = office.link(identity)
    assert await serial_seen(link) == low_bits(identity)
    office.now += AGE
    await link.renew_if_due()
    renewed = link.identity
    assert (renewed.name, renewed.key) == (identity.name, identity.key)
    assert renewed.certificate.not_valid_after_utc > office.now + timedelta(days=29)
    assert load_identity(office.folder / "press-7").certificate == renewed.certificate
    assert await serial_seen(link) == low_bits(renewed) != low_bits(identity)
    (entry,) = office.entries()
    assert (entry.kind, entry.subject) == (Kind.DEVICE_RENEWED, "device/press-7")
    assert entry.details["serial"] == f"{renewed.certificate.serial_number:x}"
    assert entry.details["replaces"] == f"{identity.certificate.serial_number:x}"
    await link.renew_if_due()
    assert len(office.kept) == 1
    await link.close()


async def test_a_link_renews_by_itself(office: Office) -> None:
    """Once the time has come, without anybody asking; whoever waits hears of the new channel."""
    link = office.link(office.enrol(), check_interval_s=0.01)
    keeper = asyncio.create_task(link.keep_valid())
    changed = link.changed
    office.now += AGE
    await asyncio.wait_for(changed.wait(), 20)
    assert len(office.kept) == 1
    keeper.cancel()
    await link.close()


async def test_a_running_transfer_ends_where_it_began(office: Office) -> None:
    """The channel from before stays open for its users, then closes; new calls use the new one."""
    identity = office.enrol()
    link = office.link(identity)
    office.blobs.pieces.put_nowait(b"one")
    async with link.channel() as older:
        download = pb_grpc.BlobServiceStub(older).Download(pb.DownloadRequest())
        assert (await download.read()).chunk == b"one"
        office.now += AGE
        await link.renew_if_due()
        assert await serial_seen(link) == low_bits(link.identity)
        office.blobs.pieces.put_nowait(b"two")
        assert (await download.read()).chunk == b"two"
        offset = await pb_grpc.BlobServiceStub(older).GetUploadOffset(pb.GetUploadOffsetRequest())
        assert offset.offset == low_bits(identity)
    with pytest.raises(grpc.aio.UsageError, match="closed"):
        await pb_grpc.BlobServiceStub(older).GetUploadOffset(pb.GetUploadOffsetRequest())
    await link.close()


async def test_what_cannot_be_kept_is_not_used(office: Office) -> None:
    """A full disk leaves the certificate from before in use; it is tried again."""
    identity = office.enrol()
    failures = [OSError("disk is full")]

    def keep(renewed: Identity) -> None:
        if failures:
            raise failures.pop()

    link = Link(office.address, identity, keep=keep, clock=office.clock, check_interval_s=0.01)
    office.now += AGE
    with pytest.raises(FederationError, match="disk is full"):
        await link.renew_if_due()
    assert link.identity is identity
    await link.renew_if_due()
    assert link.identity is not identity
    await link.close()


async def test_a_coordinator_that_is_away_is_asked_again(office: Office) -> None:
    """The certificate from before holds on meanwhile."""
    identity = office.enrol()
    office.now += AGE
    away = Link("127.0.0.1:1", identity, keep=office.kept.append, clock=office.clock)
    with pytest.raises(UnreachableError):
        await away.renew_if_due()
    assert away.identity is identity
    await away.close()


# -- who may not ------------------------------------------------------------------------------


async def test_an_expired_certificate_is_not_renewed(office: Office) -> None:
    """The device says so itself; a device that asks all the same is refused and written down."""
    identity = office.enrol()
    link = office.link(identity)
    office.now += timedelta(days=31)
    with pytest.raises(IdentityError, match=r"expired .*; enrol again with a new token"):
        await link.renew_if_due()
    with pytest.raises(IdentityError, match="expired"):
        await ask(link, make_csr(identity.key, "press-7"))
    await link.close()


async def test_a_revoked_device_is_not_renewed(office: Office) -> None:
    """Revocation is by name, so no certificate of that device helps."""
    identity = office.enrol()
    link = office.link(identity)
    office.store.revoke_device("press-7", 1.0)
    office.now += AGE
    with pytest.raises(IdentityError, match="revoked"):
        await link.renew_if_due()
    assert not office.kept
    await link.close()


async def test_a_name_does_not_move_to_another_key(office: Office) -> None:
    """Whoever borrows a connection cannot carry the device's name away; the attempt is told."""
    link = office.link(office.enrol())
    with pytest.raises(EnrolmentError, match="another key than device 'press-7'"):
        await ask(link, make_csr(new_key(), "press-7"))
    office.enrol("press-8")
    with pytest.raises(EnrolmentError, match="another key"):
        await ask(link, make_csr(load_identity(office.folder / "press-8").key, "press-8"))
    kinds = [(entry.kind, entry.subject) for entry in office.entries()]
    assert kinds == [(Kind.RENEWAL_REFUSED, "device/press-7")] * 2
    await link.close()


async def test_garbage_is_refused(office: Office) -> None:
    """What is no request, or not signed by its key."""
    identity = office.enrol()
    link = office.link(identity)
    tampered = bytearray(make_csr(identity.key, "press-7"))
    tampered[-1] ^= 1
    for csr in (b"", b"\x30\x00", bytes(tampered), b"\x00" * 10_000):
        with pytest.raises(EnrolmentError):
            await ask(link, csr)
    await link.close()


async def test_nobody_keeps_the_authority_busy(office: Office) -> None:
    """A device that asks without end is refused after some; a minute later it may again."""
    identity = office.enrol()
    link = office.link(identity)
    csr = make_csr(identity.key, "press-7")
    for _ in range(MAX_RENEWALS_PER_MINUTE):
        await ask(link, csr)
    with pytest.raises(LimitError, match="within a minute"):
        await ask(link, csr)
    office.now += timedelta(minutes=1)
    await ask(link, csr)
    await link.close()


async def ask(link: Link, csr: bytes) -> pb.RenewResponse:
    """Ask for a certificate, due or not."""
    async with link.channel() as channel:
        stub = pb_grpc.IdentityServiceStub(channel)
        with calling(link.address):
            return await stub.Renew(pb.RenewRequest(certificate_signing_request=csr), timeout=10)


@pytest.mark.parametrize("lie", ["other-name", "other-key", "foreign", "garbage"])
async def test_a_lying_coordinator_is_told(
    office: Office, serve: Serve, foreign_authority: Authority, lie: str
) -> None:
    """Only a certificate of the federation, for this name and this key, is taken."""
    identity = office.enrol()

    def certificate() -> bytes:
        csr, other = make_csr(identity.key, "x"), make_csr(new_key(), "x")
        issued = {
            "other-name": partial(office.authority.issue_client, Role.DEVICE, "press-8", csr),
            "other-key": partial(office.authority.issue_client, Role.DEVICE, "press-7", other),
            "foreign": partial(foreign_authority.issue_client, Role.DEVICE, "press-7", csr),
        }
        from cryptography.hazmat.primitives.serialization import Encoding

        return issued[lie]().public_bytes(Encoding.DER) if lie in issued else b"garbage"

    class Liar(pb_grpc.IdentityServiceServicer):
        """Answers with what it should not."""

        async def Renew(  # noqa: N802
            self, request: pb.RenewRequest, context: grpc.aio.ServicerContext
        ) -> pb.RenewResponse:
            return pb.RenewResponse(certificate=certificate())

    address = await serve(
        lambda server: pb_grpc.add_IdentityServiceServicer_to_server(Liar(), server),
        issuer=office.authority,
        clock=office.clock,
    )
    link = Link(address, identity, keep=office.kept.append, clock=office.clock)
    office.now += AGE
    with pytest.raises(IdentityError):
        await link.renew_if_due()
    assert link.identity is identity
    assert not office.kept
    await link.close()


async def test_a_renewed_device_starts_again(office: Office) -> None:
    """The renewed identity opens a channel of its own at the next start."""
    link = office.link(office.enrol())
    office.now += AGE
    await link.renew_if_due()
    await link.close()
    async with open_channel(
        office.address, load_identity(office.folder / "press-7"), clock=office.clock
    ) as channel:
        stub = pb_grpc.BlobServiceStub(channel)
        answer = await stub.GetUploadOffset(pb.GetUploadOffsetRequest(), timeout=10)
    assert answer.offset == low_bits(link.identity)
