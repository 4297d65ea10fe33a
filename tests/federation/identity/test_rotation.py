"""The coordinator's own certificates are replaced while it runs."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from minga.federation.certificates import renewal_time
from minga.federation.coordinator.authority import Authority, Lifetimes
from minga.federation.coordinator.credentials import OwnIdentity, ServerCertificate
from minga.federation.identity import (
    Identity,
    Role,
    load_identity,
    make_csr,
    new_key,
)
from minga.federation.transport import (
    SERVER_OPTIONS,
    mutual_server_credentials,
    open_channel,
    open_pinned_channel,
    open_server_credentials,
)
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.certificate_time import AGE, Time

LIFETIME = timedelta(days=30)


@pytest.fixture
def time() -> Time:
    """The authority's clock."""
    return Time()


@pytest.fixture
def issuer(tmp_path: Path, time: Time) -> Authority:
    """An authority that issues for 30 days."""
    lifetimes = Lifetimes(device=LIFETIME, operator=LIFETIME, server=LIFETIME)
    return Authority.open(tmp_path / "issuer", lifetimes=lifetimes, clock=time)


class Echo(pb_grpc.BlobServiceServicer):
    """A stream that answers each request, for as long as the client likes."""

    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadResponse:  # noqa: N802
        """Count the bytes."""
        return pb.UploadResponse(size=sum([len(r.chunk) async for r in request_iterator]))


@asynccontextmanager
async def serving(certificate: ServerCertificate, *, mutual: bool) -> AsyncIterator[str]:
    """Serve on a free port with the newest certificate."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pb_grpc.add_BlobServiceServicer_to_server(Echo(), server)
    credentials = mutual_server_credentials if mutual else open_server_credentials
    port = server.add_secure_port("127.0.0.1:0", credentials(certificate.current))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def serial_shown(address: str) -> int:
    """Shake hands anew and read the serial number of the server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what it shows is compared, not trusted
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(der).serial_number


def device_of(issuer: Authority) -> Identity:
    """Make a device."""
    key = new_key()
    certificate = issuer.issue_client(Role.DEVICE, "press-7", make_csr(key, "press-7"))
    return Identity.of(key, certificate, issuer.certificate)


@pytest.mark.parametrize("mutual", [True, False], ids=["device port", "enrolment port"])
async def test_new_connections_see_the_new_certificate(
    issuer: Authority, time: Time, mutual: bool
) -> None:
    """And a stream from before goes on; clients trust both, since both are of the authority."""
    certificate = ServerCertificate(issuer, ["127.0.0.1"])
    async with serving(certificate, mutual=mutual) as address:
        device = device_of(issuer)
        before = await serial_shown(address)
        async with open_channel(address, device, clock=time) as older:
            stream = pb_grpc.BlobServiceStub(older).Upload()
            await stream.write(pb.UploadRequest(chunk=b"before"))
            assert not certificate.renew_if_due()
            time.now += AGE
            assert certificate.renew_if_due()
            after = await serial_shown(address)
            assert after == certificate.current().certificate.serial_number != before
            async with (
                open_pinned_channel(address, issuer.certificate)
                if not mutual
                else (open_channel(address, device, clock=time)) as newer
            ):
                other = pb_grpc.BlobServiceStub(newer).Upload()
                await other.write(pb.UploadRequest(chunk=b"new"))
                await other.done_writing()
                assert (await other).size == 3
            await stream.write(pb.UploadRequest(chunk=b"after"))
            await stream.done_writing()
            assert (await stream).size == len(b"before" + b"after")
        assert not certificate.renew_if_due()
        assert await serial_shown(address) == after


def test_the_server_s_key_changes_with_its_certificate(issuer: Authority, time: Time) -> None:
    """It lives in memory alone, so nothing has to be kept in step with it."""
    certificate = ServerCertificate(issuer, ["127.0.0.1", "fleet.example"])
    first = certificate.current()
    time.now = renewal_time(first.certificate)
    assert certificate.renew_if_due()
    second = certificate.current()
    assert first.key_pem != second.key_pem
    names = [
        c.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for c in (first.certificate, second.certificate)
    ]
    assert names[0] == names[1]


def test_a_clock_that_was_set_back_gets_a_certificate_that_holds(
    issuer: Authority, time: Time
) -> None:
    """One from the future would be refused by every client."""
    certificate = ServerCertificate(issuer, ["127.0.0.1"])
    time.now -= timedelta(days=1)
    assert certificate.renew_if_due()
    assert certificate.current().certificate.not_valid_before_utc <= time.now


def test_the_operator_s_certificate_is_kept_valid(
    issuer: Authority, time: Time, tmp_path: Path
) -> None:
    """In its folder, for its key, long before it ends."""
    own = OwnIdentity(issuer, tmp_path / "operator", Role.OPERATOR, "operator")
    first = load_identity(tmp_path / "operator")
    assert not own.renew_if_due()
    time.now += timedelta(days=19)
    assert not own.renew_if_due()
    time.now += timedelta(days=4)
    assert own.renew_if_due()
    second = load_identity(tmp_path / "operator")
    assert (second.role, second.name) == (first.role, first.name)
    assert second.key.public_key() == first.key.public_key()
    assert second.certificate.not_valid_after_utc - time.now > timedelta(days=29)
