"""How errors, ports and broken trust look over real TLS on loopback."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest

from minga.federation.coordinator.authority import Authority
from minga.federation.errors import (
    AccessError,
    EnrolmentError,
    FederationError,
    IdentityError,
    LimitError,
    PeerError,
    PortInUseError,
    TrainerError,
    UnreachableError,
)
from minga.federation.identity import Identity
from minga.federation.limits import MAX_ERROR_MESSAGE_CHARS, MAX_MESSAGE_BYTES, MAX_STREAMS
from minga.federation.transport import (
    ENROLMENT_SERVER_OPTIONS,
    SERVER_OPTIONS,
    WIRE_ERRORS,
    calling,
    open_channel,
    open_pinned_channel,
    require_free_port,
    wire_error_of,
)
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

Issue = Callable[..., Identity]
Serve = Callable[..., Awaitable[str]]


@pytest.mark.parametrize("options", [SERVER_OPTIONS, ENROLMENT_SERVER_OPTIONS])
async def test_one_connection_has_so_many_calls_at_once(options: Any) -> None:
    """Who opens streams without an end has a few served; the others wait, or are refused."""
    served, release = 0, asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        nonlocal served
        served += 1
        await release.wait()
        return request

    methods = {"Wait": grpc.unary_unary_rpc_method_handler(wait)}
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/test/Wait")
        calls = [asyncio.ensure_future(ask(b"x")) for _ in range(MAX_STREAMS + 20)]
        async with asyncio.timeout(10):
            while served < MAX_STREAMS:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # for more, if there were any
        assert served == MAX_STREAMS
        release.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
    await server.stop(None)
    assert answers.count(b"x") >= MAX_STREAMS


class ReplayError(PeerError):
    """Stands for what a part of the federation derives for itself."""


class Offsets(pb_grpc.BlobServiceServicer):
    """Answers one call with an error, an answer, or silence; streams fail after one message."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure

    async def GetUploadOffset(self, request: Any, context: Any) -> pb.GetUploadOffsetResponse:  # noqa: N802
        """Fail as told, or answer."""
        if self.failure is not None:
            raise self.failure
        return pb.GetUploadOffsetResponse(offset=7)

    async def Download(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Give one message, then fail as told."""
        yield pb.DownloadResponse(chunk=b"first")
        assert self.failure is not None
        raise self.failure

    async def Upload(self, request_iterator: Any, context: Any) -> pb.UploadResponse:  # noqa: N802
        """Count what comes."""
        return pb.UploadResponse(size=sum([len(r.chunk) async for r in request_iterator]))


def adding(servicer: Offsets) -> Callable[[grpc.aio.Server], None]:
    """Put the servicer on a server."""
    return lambda server: pb_grpc.add_BlobServiceServicer_to_server(servicer, server)


async def ask(address: str, identity: Identity) -> pb.GetUploadOffsetResponse:
    """Make one call with a device's identity."""
    async with open_channel(address, identity) as channel:
        stub = pb_grpc.BlobServiceStub(channel)
        with calling(address):
            return await stub.GetUploadOffset(pb.GetUploadOffsetRequest(), timeout=10)


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", WIRE_ERRORS, ids=lambda row: row.key)
async def test_an_error_is_the_same_on_both_sides(serve: Serve, issue: Issue, row: Any) -> None:
    """Class and text cross, whatever the language of the text."""
    address = await serve(adding(Offsets(row.error("größer als 5: 拒否"))))
    with pytest.raises(FederationError, match="größer als 5: 拒否") as caught:
        await ask(address, issue())
    assert type(caught.value) is row.error


async def test_a_derived_error_crosses_as_its_nearest_class(serve: Serve, issue: Issue) -> None:
    """The wire knows a few classes; parts may have more."""
    address = await serve(adding(Offsets(ReplayError("seen before"))))
    with pytest.raises(PeerError, match="seen before") as caught:
        await ask(address, issue())
    assert type(caught.value) is PeerError
    assert wire_error_of(TrainerError("x")).error is FederationError


async def test_an_error_in_a_stream_crosses_after_what_was_sent(serve: Serve, issue: Issue) -> None:
    """The messages before it arrive."""
    address = await serve(adding(Offsets(LimitError("enough"))))
    async with open_channel(address, issue()) as channel:
        call = pb_grpc.BlobServiceStub(channel).Download(pb.DownloadRequest())
        assert (await call.read()).chunk == b"first"
        with pytest.raises(LimitError, match="enough"), calling(address):
            await call.read()


async def test_an_unforeseen_error_keeps_its_text_at_home(
    serve: Serve, issue: Issue, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller learns that it failed, the log learns why."""
    address = await serve(adding(Offsets(KeyError("/etc/secret"))))
    with pytest.raises(FederationError, match="its log says more") as caught:
        await ask(address, issue())
    assert "secret" not in str(caught.value)
    assert "/etc/secret" in caplog.text


async def test_a_long_error_is_cut(serve: Serve, issue: Issue) -> None:
    """Beyond gRPC's limit for metadata the whole answer would be lost."""
    address = await serve(adding(Offsets(EnrolmentError("x" * 100_000))))
    with pytest.raises(EnrolmentError) as caught:
        await ask(address, issue())
    assert len(str(caught.value)) == MAX_ERROR_MESSAGE_CHARS


async def test_a_message_over_the_limit_is_told(serve: Serve, issue: Issue) -> None:
    """The library itself refuses it; it is a limit all the same."""
    address = await serve(adding(Offsets()))

    async def requests() -> Any:
        yield pb.UploadRequest(chunk=b"x" * (MAX_MESSAGE_BYTES - 1000))
        yield pb.UploadRequest(chunk=b"x" * (MAX_MESSAGE_BYTES + 1))

    async with open_channel(address, issue()) as channel:
        with pytest.raises(LimitError, match="RESOURCE_EXHAUSTED"), calling(address):
            await pb_grpc.BlobServiceStub(channel).Upload(requests())


# -- trust ------------------------------------------------------------------------------------


async def test_a_trusted_device_gets_through(serve: Serve, issue: Issue) -> None:
    """The plain case, over mutual TLS."""
    address = await serve(adding(Offsets()))
    assert (await ask(address, issue())).offset == 7


async def test_a_foreign_certificate_is_told_before_dialling(
    issue: Issue, foreign_authority: Authority
) -> None:
    """The server would only close the connection, without a reason."""
    with pytest.raises(IdentityError, match="not issued by this federation's authority"):
        open_channel("127.0.0.1:1", issue(issuer=foreign_authority))


async def test_an_expired_certificate_is_told_before_dialling(issue: Issue) -> None:
    """With the date and what to do."""
    with pytest.raises(IdentityError, match=r"expired on .*; enrol again"):
        open_channel("127.0.0.1:1", issue(age=timedelta(days=40)))


async def test_a_server_refuses_a_foreign_certificate(
    serve: Serve, issue: Issue, foreign_authority: Authority
) -> None:
    """Who skips the check at home gets no further, and hears of the certificate."""
    address = await serve(adding(Offsets()))
    identity = issue(issuer=foreign_authority, trusts=foreign_authority)
    good = issue()
    disguised = Identity(
        role=identity.role,
        name=identity.name,
        key=identity.key,
        certificate=identity.certificate,
        authority=good.authority,
    )
    credentials = grpc.ssl_channel_credentials(
        disguised.authority_pem, disguised.key_pem(), disguised.certificate_pem
    )
    async with grpc.aio.secure_channel(address, credentials) as channel:
        with pytest.raises(UnreachableError, match="certificate"), calling(address):
            await pb_grpc.BlobServiceStub(channel).GetUploadOffset(pb.GetUploadOffsetRequest())


async def test_a_server_refuses_a_caller_without_a_certificate(
    serve: Serve, authority: Authority
) -> None:
    """On the device port TLS itself asks for one."""
    address = await serve(adding(Offsets()))
    async with open_pinned_channel(address, authority.certificate) as channel:
        with pytest.raises(UnreachableError, match="certificate"), calling(address):
            await pb_grpc.BlobServiceStub(channel).GetUploadOffset(pb.GetUploadOffsetRequest())


async def test_another_federation_s_coordinator_is_not_trusted(
    serve: Serve, issue: Issue, foreign_authority: Authority
) -> None:
    """A device's identity names its own authority."""
    address = await serve(adding(Offsets()))
    stranger = issue(issuer=foreign_authority, trusts=foreign_authority)
    with pytest.raises(IdentityError, match=f"{address} has a certificate that this identity"):
        await ask(address, stranger)


async def test_a_coordinator_by_another_name_is_not_trusted(serve: Serve, issue: Issue) -> None:
    """Its certificate must be made out to the host that is dialled."""
    address = await serve(adding(Offsets()), hosts=("coordinator.example",))
    with pytest.raises(IdentityError, match="not made out to that host"):
        await ask(address, issue())


async def test_a_coordinator_with_an_expired_certificate_is_not_trusted(
    serve: Serve, issue: Issue, authority: Authority
) -> None:
    """The message tells it from a foreign one."""
    past = authority.clock() - timedelta(days=100)
    old = Authority(certificate=authority.certificate, key=authority.key, clock=lambda: past)
    address = await serve(adding(Offsets()), issuer=old)
    with pytest.raises(IdentityError, match="has expired; restart the coordinator"):
        await ask(address, issue())


# -- reaching ---------------------------------------------------------------------------------


async def test_nobody_there_is_told(issue: Issue) -> None:
    """Address, reason and remedy."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=f"{address} .*Connection refused.*; start it"):
            await ask(address, issue())


async def test_what_speaks_no_tls_is_told(issue: Issue) -> None:
    """Some other program listens on that port."""

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        with pytest.raises(UnreachableError, match=f"no coordinator answers at {address}"):
            await ask(address, issue())


def test_a_port_in_use_is_told() -> None:
    """Before anything is started; a free one and 0 pass."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} on 127.0.0.1 is in use"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", 0)


def test_an_address_of_another_machine_is_told() -> None:
    """It is no port in use, and the message says what to choose."""
    with pytest.raises(FederationError, match="choose an address of this machine"):
        require_free_port("203.0.113.7", 0)


def test_every_error_crosses_by_one_row() -> None:
    """Keys and classes are unique, and the base class is among them."""
    assert len({row.key for row in WIRE_ERRORS}) == len(WIRE_ERRORS)
    assert len({row.error for row in WIRE_ERRORS}) == len(WIRE_ERRORS)
    assert {FederationError, AccessError} <= {row.error for row in WIRE_ERRORS}
