"""A blob service, and a TCP proxy that cuts links to it, for tests of what heals."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from minga.federation import transport
from minga.federation.identity import Identity, Role
from minga.federation.transfer import BlobStub
from minga.federation.transport import open_channel
from tests.federation.blobs.depot import Depot

Issue = Callable[..., Identity]
Serve = Callable[..., Awaitable[str]]

# Without probing for a larger window, hardly more than one chunk is under way when a link is cut:
# the tests below can tell progress by the bytes that the proxy let through.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0),)


class CuttingProxy:
    """Forwards connections to a server and cuts each after its budget of bytes.

    Attributes:
        budgets: For each connection to come, how many bytes pass in both directions together
            before it is closed; connections beyond the list are not cut.
        num_connections: How many have come.
    """

    def __init__(self, target: str, budgets: list[int]) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self.budgets = budgets
        self.num_connections = 0

    async def start(self) -> str:
        """Listen on a free port and give the address."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Close everything."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        index, self.num_connections = self.num_connections, self.num_connections + 1
        left = [self.budgets[index] if index < len(self.budgets) else 2**62]
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, left)),
            asyncio.create_task(self._pump(far_reader, writer, left)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, far_writer):
                end.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, left: list[int]
    ) -> None:
        while left[0] > 0 and (data := await source.read(min(left[0], 2**16))):
            left[0] -= len(data)
            sink.write(data)
            await sink.drain()


@pytest.fixture
async def cutting_proxy() -> AsyncIterator[Callable[[str, list[int]], Awaitable[CuttingProxy]]]:
    """Starts proxies; `address` is where each listens."""
    proxies: list[CuttingProxy] = []

    async def start(target: str, budgets: list[int]) -> CuttingProxy:
        proxy = CuttingProxy(target, budgets)
        proxy.address = await proxy.start()
        proxies.append(proxy)
        return proxy

    yield start
    for proxy in proxies:
        await proxy.stop()


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    """A store behind a service."""
    return Depot(tmp_path / "blobs")


@pytest.fixture
async def address(depot: Depot, serve: Serve) -> str:
    """Where the depot listens."""
    return await serve(depot.add_services, options=SMALL_WINDOW)


@pytest.fixture
async def connect(
    issue: Issue, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    """Opens stubs for identities."""
    channels: list[grpc.aio.Channel] = []
    options = (*transport.CHANNEL_OPTIONS, *SMALL_WINDOW)
    monkeypatch.setattr(transport, "CHANNEL_OPTIONS", options)

    def open_stub(address: str, name: str = "press-7", role: Role = Role.DEVICE) -> Any:
        channels.append(open_channel(address, issue(name, role)))
        return BlobStub(channels[-1])

    yield open_stub
    for channel in channels:
        await channel.close()
