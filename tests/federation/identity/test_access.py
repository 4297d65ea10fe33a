"""Who may call what: the whole table, over real TLS."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest

from minga.federation.coordinator.access import ALLOWED, Everybody, Gatekeeper, principal_of_call
from minga.federation.coordinator.authority import Authority
from minga.federation.errors import AccessError, FederationError, IdentityError
from minga.federation.identity import Identity, Principal, Role, utc_now
from minga.federation.transport import calling, open_channel, open_pinned_channel
from minga.federation.v1 import federation_pb2 as pb

Issue = Callable[..., Identity]
Serve = Callable[..., Awaitable[str]]

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

# Written out once more on purpose: a change of the table must be made twice.
DEVICE, OPERATOR = Role.DEVICE, Role.OPERATOR
EXPECTED = {
    "EnrollmentService/Enroll": set(Role),
    "IdentityService/Renew": {DEVICE},
    "FederationService/Session": {DEVICE},
    "BlobService/Upload": {DEVICE, OPERATOR},
    "BlobService/GetUploadOffset": {DEVICE, OPERATOR},
    "BlobService/Download": {DEVICE, OPERATOR},
    "OperatorService/CreateToken": {OPERATOR},
    "OperatorService/ListDevices": {OPERATOR},
    "OperatorService/RevokeDevice": {OPERATOR},
    "OperatorService/RevokeIdentity": {OPERATOR},
    "OperatorService/StartCampaign": {OPERATOR},
    "OperatorService/WatchCampaign": {OPERATOR},
    "OperatorService/CancelCampaign": {OPERATOR},
    "OperatorService/PublishModel": {OPERATOR},
    "OperatorService/GetStatus": {OPERATOR},
}


def stand_ins(server: grpc.aio.Server) -> None:
    """Serve every method of the protocol with its kind of call; each names its caller."""

    def whoami(context: Any) -> bytes:
        return str(principal_of_call(context)).encode()

    async def one(request: Any, context: Any) -> bytes:
        return whoami(context)

    async def many(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield whoami(context)

    makers = {
        (False, False): lambda: grpc.unary_unary_rpc_method_handler(one),
        (False, True): lambda: grpc.unary_stream_rpc_method_handler(many),
        (True, False): lambda: grpc.stream_unary_rpc_method_handler(one),
        (True, True): lambda: grpc.stream_stream_rpc_method_handler(many),
    }
    services: dict[str, dict[str, Any]] = {"minga.federation.v1.BlobService": {}}
    for path, method in METHODS.items():
        service = path.split("/")[1]
        handler = makers[method.client_streaming, method.server_streaming]()
        services.setdefault(service, {})[method.name] = handler
    services["minga.federation.v1.BlobService"]["Forgotten"] = makers[False, False]()
    for name, handlers in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


async def call(channel: grpc.aio.Channel, path: str) -> bytes:
    """Call a method by its path, with its kind of call and one empty message."""
    method = METHODS.get(path)
    client_streaming = method is not None and method.client_streaming
    server_streaming = method is not None and method.server_streaming

    async def requests() -> AsyncIterator[bytes]:
        yield b""
        await asyncio.Event().wait()  # as a session does: it stays open

    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    started = kinds[client_streaming, server_streaming](path)(
        requests() if client_streaming else b"", timeout=10
    )
    with calling("coordinator"):
        if not server_streaming:
            return await started
        return b"".join([response async for response in started])


def test_the_table_has_a_row_for_every_method() -> None:
    """And no row for a method that does not exist."""
    assert set(ALLOWED) == set(METHODS)
    for path, allowed in ALLOWED.items():
        roles = set(Role) if isinstance(allowed, Everybody) else set(allowed)
        assert roles == EXPECTED[path.removeprefix("/minga.federation.v1.")]


@pytest.mark.parametrize("role", list(Role))
async def test_the_whole_matrix(serve: Serve, issue: Issue, role: Role) -> None:
    """Each role on each method: the caller is known to the handler, or refused."""
    address = await serve(stand_ins)
    async with open_channel(address, issue("somebody", role)) as channel:
        for path in METHODS:
            if role in EXPECTED[path.removeprefix("/minga.federation.v1.")]:
                assert await call(channel, path) == f"{role} 'somebody'".encode()
            else:
                with pytest.raises(AccessError, match=f"{role} 'somebody' may not call"):
                    await call(channel, path)


async def test_a_method_without_a_row_is_refused_to_everybody(serve: Serve, issue: Issue) -> None:
    """Forgetting a row locks out; what does not exist at all is told as such."""
    address = await serve(stand_ins)
    for role in Role:
        async with open_channel(address, issue("somebody", role)) as channel:
            with pytest.raises(AccessError):
                await call(channel, "/minga.federation.v1.BlobService/Forgotten")
            with pytest.raises(FederationError, match="UNIMPLEMENTED"):
                await call(channel, "/minga.federation.v1.BlobService/Unknown")


async def test_without_a_certificate_only_enrolment_is_open(
    serve: Serve, authority: Authority
) -> None:
    """On a port that asks for none, everything else is refused."""
    address = await serve(stand_ins, mutual=False)
    async with open_pinned_channel(address, authority.certificate) as channel:
        for path in METHODS:
            # The stand-in for Enroll itself asks who calls, and nobody is nobody.
            with pytest.raises(IdentityError, match="needs a client certificate"):
                await call(channel, path)
    Gatekeeper(authority=authority.certificate, is_revoked=lambda principal: True).admit(
        "/minga.federation.v1.EnrollmentService/Enroll", None
    )


async def test_a_revoked_device_is_refused_at_its_next_call(serve: Serve, issue: Issue) -> None:
    """On the connection that it has; others go on."""
    revoked: set[tuple[Role, str]] = set()

    def is_revoked(principal: Principal) -> bool:
        return (principal.role, principal.name) in revoked

    address = await serve(stand_ins, is_revoked=is_revoked)
    path = "/minga.federation.v1.BlobService/Download"
    async with (
        open_channel(address, issue("press-7")) as seven,
        open_channel(address, issue("press-8")) as eight,
    ):
        assert await call(seven, path)
        revoked.add((Role.DEVICE, "press-7"))
        with pytest.raises(IdentityError, match="device 'press-7' was revoked"):
            await call(seven, path)
        assert await call(eight, path) == b"device 'press-8'"


async def test_a_connection_does_not_outlive_its_certificate(serve: Serve, issue: Issue) -> None:
    """TLS looks once; the gatekeeper looks at each call."""
    now = utc_now()
    address = await serve(stand_ins, clock=lambda: now)
    async with open_channel(address, issue()) as channel:
        path = "/minga.federation.v1.FederationService/Session"
        assert await call(channel, path)
        now += timedelta(days=31)
        with pytest.raises(IdentityError, match="expired"):
            await call(channel, path)


async def test_a_refused_stream_need_not_say_anything(
    serve: Serve, issue: Issue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given a moment to send its opening, so that it hears the reason, and then closed."""
    monkeypatch.setattr("minga.federation.coordinator.access.REFUSAL_GRACE_S", 0.01)
    address = await serve(stand_ins, is_revoked=lambda principal: True)
    async with open_channel(address, issue()) as channel:
        session = channel.stream_stream("/minga.federation.v1.FederationService/Session")()
        with pytest.raises(IdentityError, match="revoked"), calling(address):
            await session.read()
