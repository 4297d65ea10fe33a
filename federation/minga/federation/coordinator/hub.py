"""Which devices are connected, and the way to each of them.

Lives in one event loop. Nothing here is durable: a push that is lost is pushed again when the
device comes back.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minga.federation.condition import Condition
from minga.federation.errors import FederationError
from minga.federation.limits import OUTBOX_CLOSE_S, OUTBOX_MESSAGES, RETURN_S
from minga.federation.v1.federation_pb2 import SessionResponse

_log = logging.getLogger(__name__)


class Signal:
    """Wakes everybody who waits, each time it fires.

    Take `next()` before looking at the state that the signal speaks of, and wait for what it gave:
    then no firing in between is missed.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all who wait now."""
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Give the event that the next firing sets."""
        return self._event


async def wait_for_any(events: Sequence[asyncio.Event], timeout_s: float | None) -> None:
    """Wait until one of some events is set, or the time is up."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class Outbox:
    """Messages for one device, in order; `None` is the last one. One task takes them out.

    An `asyncio.Queue` would do, but holds four times the memory for a device that waits: there are
    ten thousand of them.
    """

    __slots__ = ("_messages", "_waiter")

    def __init__(self) -> None:
        self._messages: list[SessionResponse | None] = []
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: SessionResponse | None) -> None:
        """Add a message."""
        self._messages.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def pop(self) -> None:
        """Take the oldest message out for nobody."""
        del self._messages[0]

    async def get(self) -> SessionResponse | None:
        """Wait for the next message."""
        while not self._messages:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._messages.pop(0)


@dataclass(slots=True, eq=False)
class Connection:
    """One open control stream. `None` in its outbox ends it; `cut` ends it by force."""

    device_id: str
    group: str
    trains: bool
    heard_at: float = 0.0
    cut: Callable[[], object] = lambda: None
    serial: int = 0  # of the certificate that opened it
    condition: Condition | None = None  # what the device last said of its machine
    outbox: Outbox = field(default_factory=Outbox)
    is_closed: bool = False
    heartbeat_interval_s: float = 0.0
    """How often the device was last told to say that it is alive."""
    patience_s: float = math.inf
    """A silence longer than this means that the device hangs."""
    heard_last: float = 0.0
    """The event loop's time at which something came."""
    error: FederationError | None = None
    """What the stream ends with; None: with nothing."""

    def send(self, message: SessionResponse) -> bool:
        """Queue a message; a device that reads nothing for so long is cut off instead."""
        if self.is_closed:
            return False
        if len(self.outbox) >= OUTBOX_MESSAGES:
            self.close()
            return False
        self.outbox.put(message)
        return True

    def close(self) -> None:
        """End the stream after what is queued; soon by force, should the device not read that."""
        if self.is_closed:
            return
        self.is_closed = True
        if len(self.outbox) >= OUTBOX_MESSAGES:
            self.outbox.pop()
        self.outbox.put(None)
        asyncio.get_running_loop().call_later(OUTBOX_CLOSE_S, self.cut)


class Hub:
    """All open control streams, one per device."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.changed = Signal()
        self._clock = clock
        self._started_at = clock()
        self._connections: dict[str, Connection] = {}
        self._left_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def join(self, connection: Connection) -> None:
        """Register a stream; an older one of the same device is closed."""
        older = self._connections.get(connection.device_id)
        if older is not None:
            if older.serial == connection.serial:  # else the device renewed its certificate
                _log.warning("%s opened a second stream; the first is closed", connection.device_id)
            older.close()
        self._connections[connection.device_id] = connection
        self._left_at.pop(connection.device_id, None)
        self.changed.fire()

    def leave(self, connection: Connection) -> None:
        """Forget a stream, unless a newer one has taken its place."""
        if self._connections.get(connection.device_id) is connection:
            del self._connections[connection.device_id]
            self._left_at[connection.device_id] = self._clock()
            self.changed.fire()

    def connection(self, device_id: str) -> Connection | None:
        """Give a device's open stream."""
        return self._connections.get(device_id)

    def connected(self, group: str = "") -> list[Connection]:
        """Give the open streams of a group, or all."""
        return [c for c in self._connections.values() if group in ("", c.group)]

    def gone_since(self, device_id: str) -> float | None:
        """Say since when a device is away; None if it is here.

        One that is not back yet after a restart may still be on its way.
        """
        if device_id in self._connections:
            return None
        return self._left_at.get(device_id, self._started_at + RETURN_S)

    def drop(self, device_id: str) -> None:
        """Close a device's stream, if it is open; from now on it is away."""
        connection = self._connections.get(device_id)
        if connection is not None:
            connection.close()
            self.leave(connection)

    def drop_all(self, farewell: SessionResponse) -> None:
        """Close every stream, each with a last message."""
        for connection in list(self._connections.values()):
            connection.send(farewell)
            connection.close()
