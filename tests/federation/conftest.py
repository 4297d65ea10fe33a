"""What tests of the wire share: an authority, identities, real TLS servers on loopback."""

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from minga.federation.coordinator.access import AccessInterceptor, Gatekeeper
from minga.federation.coordinator.authority import Authority, Lifetimes
from minga.federation.coordinator.calls import RunningCalls
from minga.federation.identity import Clock, Identity, Principal, Role, make_csr, new_key, utc_now
from minga.federation.transport import (
    SERVER_OPTIONS,
    ErrorInterceptor,
    mutual_server_credentials,
    open_server_credentials,
)

Issue = Callable[..., Identity]
AddServices = Callable[[grpc.aio.Server], None]
Serve = Callable[..., Awaitable[str]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw a seed for a test that leaves something to chance; it is part of the test's name.

    So all processes of one run draw the same.
    """
    if "chaos_seed" in metafunc.fixturenames:
        seed = metafunc.config.getoption("chaos_seed")
        if seed is None:
            seed = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10_000)
        metafunc.parametrize("chaos_seed", [seed], ids=[f"seed={seed}"])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The authority of the federation under test."""
    return Authority.open(tmp_path / "authority")


@pytest.fixture
def foreign_authority(tmp_path: Path) -> Authority:
    """The authority of another federation."""
    return Authority.open(tmp_path / "foreign-authority")


@pytest.fixture
def issue(authority: Authority) -> Issue:
    """Makes identities; `age` issues them in the past."""

    def issue_identity(
        name: str = "press-7",
        role: Role = Role.DEVICE,
        *,
        issuer: Authority = authority,
        trusts: Authority = authority,
        age: timedelta = timedelta(0),
    ) -> Identity:
        then = Authority(
            certificate=issuer.certificate,
            key=issuer.key,
            lifetimes=Lifetimes(device=timedelta(days=30)),
            clock=lambda: utc_now() - age,
        )
        key = new_key()
        certificate = then.issue_client(role, name, make_csr(key, name))
        return Identity.of(key, certificate, trusts.certificate)

    return issue_identity


@pytest.fixture
async def serve(authority: Authority) -> AsyncIterator[Serve]:
    """Starts servers with our interceptors on free loopback ports and gives their addresses."""
    servers: list[grpc.aio.Server] = []

    async def start(
        add_services: AddServices,
        *,
        issuer: Authority = authority,
        mutual: bool = True,
        is_revoked: Callable[[Principal], bool] = lambda principal: False,
        clock: Clock = utc_now,
        hosts: tuple[str, ...] = ("127.0.0.1",),
        options: tuple[tuple[str, int], ...] = (),
        calls: RunningCalls | None = None,
    ) -> str:
        gatekeeper = Gatekeeper(authority=issuer.certificate, is_revoked=is_revoked, clock=clock)
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(), AccessInterceptor(gatekeeper, calls=calls)],
            options=[*SERVER_OPTIONS, *options],
        )
        add_services(server)
        credentials = mutual_server_credentials if mutual else open_server_credentials
        identity = issuer.issue_server(hosts)
        port = server.add_secure_port("127.0.0.1:0", credentials(lambda: identity))
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)
