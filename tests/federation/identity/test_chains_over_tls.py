"""Chains of an offline root over real mutual TLS on loopback."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from minga.federation.certificates import chain_to_pem
from minga.federation.coordinator.authority import Authority, authority_builder, common_name
from minga.federation.coordinator.credentials import ServerCertificate
from minga.federation.coordinator.root import Root
from minga.federation.errors import (
    FederationError,
    IdentityError,
    UnreachableError,
)
from minga.federation.identity import (
    Identity,
    Role,
    ServerIdentity,
    key_to_pem,
    make_csr,
    new_key,
    utc_now,
)
from minga.federation.transport import (
    calling,
    mutual_server_credentials,
    open_channel,
    open_pinned_channel,
)
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.identity.roots import appointed, crafted_authority, member, pem, posing_as

Serve = Callable[..., Awaitable[str]]


class Offsets(pb_grpc.BlobServiceServicer):
    """Answers one call."""

    async def GetUploadOffset(self, request: Any, context: Any) -> pb.GetUploadOffsetResponse:  # noqa: N802
        """Answer."""
        return pb.GetUploadOffsetResponse(offset=7)


def adding(server: grpc.aio.Server) -> None:
    """Put the service on a server."""
    pb_grpc.add_BlobServiceServicer_to_server(Offsets(), server)


async def ask(address: str, identity: Identity) -> int:
    """Make one call."""
    async with open_channel(address, identity) as channel:
        return await asked(channel, address)


async def asked(channel: grpc.aio.Channel, address: str) -> int:
    """Make one call on a channel."""
    with calling(address):
        stub = pb_grpc.BlobServiceStub(channel)
        return (await stub.GetUploadOffset(pb.GetUploadOffsetRequest(), timeout=10)).offset


async def test_both_sides_meet_under_the_root(first: Authority, serve: Serve) -> None:
    """The plain case, over mutual TLS."""
    address = await serve(adding, issuer=first)
    assert await ask(address, member(first)) == 7


async def test_a_coordinator_of_another_root_is_not_trusted(
    first: Authority, tmp_path: Path, serve: Serve
) -> None:
    """By a device, and by who redeems a token; nor does it trust them."""
    foreign = appointed(tmp_path / "foreign", Root.create(tmp_path / "foreign-root", ""))
    address = await serve(adding, issuer=foreign)
    with pytest.raises(IdentityError, match="does not trust"):
        await ask(address, member(first))
    async with open_pinned_channel(address, first.certificate) as channel:
        with pytest.raises(IdentityError, match="does not trust"):
            await asked(channel, address)
    stranger = member(first)
    async with grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            pem(foreign.pinned), stranger.key_pem(), stranger.certificate_pem
        ),
    ) as channel:
        with pytest.raises(UnreachableError, match="certificate"):
            await asked(channel, address)


async def test_a_coordinator_of_a_replaced_intermediate_is_not_trusted(
    first: Authority, second: Authority, serve: Serve
) -> None:
    """Once a device has seen the newer one: TLS itself refuses, before a byte is said."""
    address = await serve(adding, issuer=first)
    with pytest.raises(IdentityError, match="does not trust"):
        await ask(address, member(second))
    # Before, the thief's coordinator is the federation's.
    assert await ask(address, member(first)) == 7


def ended_and_twin(root: Root) -> tuple[x509.Certificate, Authority]:
    """Give an intermediate that ended, and one for the same key that issues young leaves."""
    twin = crafted_authority(root.key, root.certificate)
    ended = crafted_authority(root.key, root.certificate, key=twin.key, age=timedelta(days=2))
    return ended.certificate, twin


class Showing(Authority):
    """An authority whose servers show another chain."""

    def __init__(self, authority: Authority, server: ServerIdentity) -> None:
        super().__init__(certificate=authority.certificate, key=authority.key, root=authority.root)
        object.__setattr__(self, "_server", server)

    def issue_server(self, hosts: Sequence[str]) -> ServerIdentity:
        """Give that chain."""
        return self._server  # type: ignore[attr-defined, no-any-return]


async def test_a_coordinator_of_an_expired_intermediate_is_not_trusted(
    root: Root, first: Authority, serve: Serve
) -> None:
    """Though its own certificate be young; nor does a device dial with such a one."""
    ended, twin = ended_and_twin(root)
    server = twin.issue_server(["127.0.0.1"])
    shown = replace(server, certificate_pem=chain_to_pem(server.certificate, ended))
    address = await serve(adding, issuer=Showing(first, shown))
    async with open_pinned_channel(address, ended) as channel:
        with pytest.raises(IdentityError, match="has expired"):
            await asked(channel, address)
    device = member(twin)
    identity = Identity.of(device.key, device.certificate, root.certificate, ended)
    with pytest.raises(IdentityError, match=r"expired on .*; the coordinator's operator"):
        open_channel(address, identity)


Crafted = tuple[Authority, list[x509.Certificate]]
"""Who issues a leaf, and what is shown behind it."""


def by_a_leaf(root: Root, first: Authority) -> Crafted:
    """A device signs for another one."""
    device = member(first)
    return posing_as(device, first), [device.certificate, first.certificate]


def by_a_sub_authority(root: Root, first: Authority) -> Crafted:
    """The intermediate, whose path length is 0, makes an authority of its own."""
    below = crafted_authority(first.key, first.certificate)
    return below, [below.certificate, first.certificate]


def by_the_root(root: Root, first: Authority) -> Crafted:
    """There is no intermediate."""
    return Authority(certificate=root.certificate, key=root.key), []


def by_another_domain(root: Root, first: Authority) -> Crafted:
    """The root allows the intermediate names of another trust domain alone."""
    constrained = _constrained_to("other", root, first)
    return Authority(certificate=constrained, key=first.key, root=root.certificate), [constrained]


def by_an_ended_one(root: Root, first: Authority) -> Crafted:
    """The leaf is young, the intermediate is not valid any more."""
    ended, twin = ended_and_twin(root)
    return twin, [ended]


def _constrained_to(domain: str, root: Root, first: Authority) -> x509.Certificate:
    """Give the first one's intermediate anew, with a name constraint that its leaves break."""
    constraint = x509.NameConstraints([x509.UniformResourceIdentifier(domain)], None)
    return (
        authority_builder(
            common_name("constrained"),
            first.key.public_key(),
            "minga",
            path_length=0,
            serial_number=8,
        )
        .issuer_name(root.certificate.subject)
        .not_valid_before(utc_now() - timedelta(days=1))
        .not_valid_after(utc_now() + timedelta(days=1))
        .add_extension(constraint, critical=True)
        .sign(root.key, hashes.SHA256())
    )


@pytest.mark.parametrize(
    "craft",
    [by_a_leaf, by_a_sub_authority, by_the_root, by_another_domain, by_an_ended_one],
    ids=lambda craft: craft.__name__,
)
async def test_crafted_chains_get_no_call_through(
    root: Root, first: Authority, serve: Serve, craft: Callable[[Root, Authority], Crafted]
) -> None:
    """On the coordinator's side, where TLS takes all that leads to the root and no more."""
    issuer, shown = craft(root, first)
    address = await serve(adding, issuer=first)
    key = new_key()
    leaf = issuer.issue_client(Role.DEVICE, "press-8", make_csr(key, "press-8"))
    credentials = grpc.ssl_channel_credentials(
        pem(first.certificate), key_to_pem(key), b"".join(map(pem, [leaf, *shown]))
    )
    async with grpc.aio.secure_channel(address, credentials) as channel:
        with pytest.raises(FederationError, match="certificate"):
            await asked(channel, address)


async def test_a_server_certificate_by_a_device_is_not_trusted(
    first: Authority, serve: Serve
) -> None:
    """A stolen device's key makes no coordinator."""
    device = member(first)
    server = posing_as(device, first).issue_server(["127.0.0.1"])
    shown = replace(
        server,
        certificate_pem=pem(server.certificate) + pem(device.certificate) + pem(first.certificate),
    )
    address = await serve(adding, issuer=Showing(first, shown))
    with pytest.raises(IdentityError, match="does not trust"):
        await ask(address, member(first))


async def test_an_intermediate_may_delegate_its_servers(first: Authority, serve: Serve) -> None:
    """A limit: BoringSSL does not hold a trusted intermediate to its own path length.

    Who has its key can make servers anyway, and both end with it. Clients are refused: see above.
    """
    below = crafted_authority(first.key, first.certificate)
    server = below.issue_server(["127.0.0.1"])
    chain = chain_to_pem(server.certificate, below.certificate) + pem(first.certificate)
    address = await serve(adding, issuer=Showing(first, replace(server, certificate_pem=chain)))
    assert await ask(address, member(first)) == 7
    async with open_pinned_channel(address, first.pinned) as channel:
        with pytest.raises(IdentityError, match="does not trust"):  # by the root it is refused
            await asked(channel, address)


async def test_the_server_s_certificate_rotates_under_its_intermediate(
    tmp_path: Path,
) -> None:
    """New connections see the new one, with the intermediate behind it."""
    now = [utc_now() - timedelta(days=80)]
    folder = tmp_path / "authority"
    issuing = appointed(folder, Root.create(tmp_path / "older", "", clock=lambda: now[0]))
    authority = replace(issuing, clock=lambda: now[0])
    certificate = ServerCertificate(authority, ["127.0.0.1"])
    server = grpc.aio.server()
    adding(server)
    port = server.add_secure_port("127.0.0.1:0", mutual_server_credentials(certificate.current))
    await server.start()
    address = f"127.0.0.1:{port}"
    try:
        device = member(
            Authority(certificate=issuing.certificate, key=issuing.key, root=issuing.root)
        )
        assert await ask(address, device) == 7
        before = certificate.current().certificate.serial_number
        now[0] = utc_now()
        assert certificate.renew_if_due()
        assert certificate.current().certificate.serial_number != before
        assert await ask(address, device) == 7
    finally:
        await server.stop(None)
