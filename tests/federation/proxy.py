"""A TCP proxy on loopback whose link can be slow, go dead, break, or damage what it carries."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

_PIECE_BYTES = 64 * 1024
_LONG_BYTES = 16 * 1024  # of a blob, as all else is short
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class Proxy:
    """Carries bytes between devices and a coordinator, as long as its link is up.

    Make one with `open_proxy`. Two kinds of partition:

    - `black_hole()`: nothing is carried and nothing is told; connections stay open, new ones are
      taken by the kernel and hang. What was sent meanwhile arrives after `heal()`, as TCP would
      send it again.
    - `cut()`: every connection is reset, and so is each new one.

    Args:
        port: Where the coordinator listens on loopback.
        latency_s: How long a piece of 64 KiB takes each way: it also bounds what the link carries.
    """

    def __init__(self, port: int, *, latency_s: float = 0.0) -> None:
        self.port = port
        self.latency_s = latency_s
        self.bytes_up = 0
        """Bytes that devices sent and the coordinator got."""
        self._is_up = asyncio.Event()
        self._is_up.set()
        self._is_cut = False
        self._damages = False
        self._alarm: tuple[int, Callable[[], None], asyncio.Event] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Reset every connection and end."""
        self.cut()
        self._server.close()
        await asyncio.gather(*self._calls, return_exceptions=True)

    # --- what happens to the link ---

    def black_hole(self) -> None:
        """Carry nothing from now on, and tell nobody."""
        self._is_up.clear()

    def cut(self) -> None:
        """Reset all connections, and every new one."""
        self._is_cut = True
        for writer in list(self._writers):
            _reset(writer)
        for call in self._calls:
            call.cancel()

    def damage(self) -> None:
        """Change one byte of the next long piece, whichever way it goes."""
        self._damages = True

    def heal(self) -> None:
        """Carry again."""
        self._is_cut = False
        self._is_up.set()

    async def carried_up(self, num_bytes: int, *, then: Callable[[], None]) -> None:
        """Wait until devices got so many more bytes through, and do something at that moment.

        Args:
            num_bytes: How many, counted from now.
            then: What is done before another byte gets through.
        """
        self._alarm = (self.bytes_up + num_bytes, then, asyncio.Event())
        await self._alarm[-1].wait()

    # --- carrying ---

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        self._writers.add(writer)
        try:
            if self._is_cut:
                return
            await self._is_up.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
            self._writers.add(far_writer)
            try:
                await self._both_ways(reader, writer, far_reader, far_writer)
            finally:
                self._writers.discard(far_writer)
                _reset(far_writer)
        except (OSError, asyncio.CancelledError):
            pass  # the coordinator does not listen, or the link was cut: the device is reset
        finally:
            self._calls.discard(call)
            self._writers.discard(writer)
            _reset(writer)

    async def _both_ways(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Carry until one side closes: gRPC needs no half-closed connections."""
        ways = [
            asyncio.create_task(self._one_way(reader, far_writer, is_up=True)),
            asyncio.create_task(self._one_way(far_reader, writer, is_up=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _one_way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool
    ) -> None:
        while piece := await reader.read(_PIECE_BYTES):
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            await self._is_up.wait()
            if self._damages and len(piece) > _LONG_BYTES:
                self._damages = False
                middle = len(piece) // 2
                piece = piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
            writer.write(piece)
            await writer.drain()
            if is_up:
                self._count(len(piece))

    def _count(self, num_bytes: int) -> None:
        self.bytes_up += num_bytes
        if self._alarm is not None and self.bytes_up >= self._alarm[0]:
            _, then, is_reached = self._alarm
            self._alarm = None
            then()
            is_reached.set()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other side gets a reset, not an end."""
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


@asynccontextmanager
async def open_proxy(port: int, *, latency_s: float = 0.0) -> AsyncIterator[Proxy]:
    """Run a proxy in front of a coordinator's port."""
    proxy = Proxy(port, latency_s=latency_s)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
