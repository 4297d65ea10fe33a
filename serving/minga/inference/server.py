"""An ASGI application on a port of this process, inside a running event loop.

uvicorn does the HTTP. What is added: the port is taken before anything else happens, so a
taken port is one clear error; signals stay with whoever owns the loop; `start` returns when
requests are answered and `stop` when the last one was.

Several processes may share a port (SO_REUSEPORT): the system gives each new connection to one of
them, for good. So one that leaves has to see to it that none of its connections is cut (`retire`),
and connections end now and then, so that a process that comes gets some.
"""

import asyncio
import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Self

import uvicorn

from minga.inference.connections import guarded
from minga.inference.errors import InferenceError, PortInUseError
from minga.inference.open_files import max_connections
from minga.inference.tls import ServerTls

_BACKLOG: Final = 2048
_IDLE_CONNECTION_S: Final = 75  # longer than common clients keep one: they close, we do not
_DRAIN_S: Final = 10
_MAX_AGE_S: Final = 30  # of a connection to a port that is shared
_SETTLE_S: Final = 0.2  # what a handshake that has begun may take
_FAREWELL_S: Final = 2  # for idle callers to ask once more, and hear that they shall reconnect
_CLOSE: Final = (b"connection", b"close")
_ATTACH_FILTER: Final = 26  # Linux' SO_ATTACH_FILTER, which Python does not name
# Classic BPF over a TCP segment: drop it if it has the flag SYN, else pass it.
_NO_SYN: Final = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF))
)


class Server:
    """Serves one ASGI application over HTTP.

    Args:
        app: the application.
        host: the address to listen on.
        port: the port to listen on; 0 lets the system choose one.
        shared: let other processes of this user listen on the same port.
        tls: what the server shows; None means plain HTTP.

    Raises:
        AccessError: TLS cannot be set up.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        shared: bool = False,
        tls: ServerTls | None = None,
    ) -> None:
        self._host = host
        self._is_shared = shared
        self._has_retired = False
        self._scheme = "https" if tls else "http"
        self._wanted_port = port
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_level="error",  # what callers do wrong is counted, not logged
            access_log=False,
            server_header=False,
            http="httptools",
            ws="none",
            timeout_keep_alive=_IDLE_CONNECTION_S,
            timeout_graceful_shutdown=_DRAIN_S,
        )
        config.load()
        config.ssl = tls.context() if tls else None
        config.http_protocol_class = guarded(
            config.http_protocol_class,  # type: ignore[arg-type]
            max_connections=max_connections(),
            max_age_s=_MAX_AGE_S if shared else None,
        )
        self._uvicorn = _Uvicorn(config)

    @property
    def port(self) -> int:
        """The port that is listened on; only after `start`."""
        assert self._socket is not None, "the server has not been started"
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """Where clients reach the server; only after `start`."""
        return f"{self._scheme}://{url_host(self._host)}:{self.port}"

    @property
    def num_requests(self) -> int:
        """How many requests are in hand: their headers have come, their answers have not gone."""
        return len(self._uvicorn.server_state.tasks)

    async def start(self) -> None:
        """Listen, and return once requests are answered.

        Raises:
            PortInUseError: the port is taken.
        """
        self._socket = listen(self._host, self._wanted_port, shared=self._is_shared)
        self._task = asyncio.create_task(self._uvicorn.serve([self._socket]))
        answering = asyncio.create_task(self._uvicorn.answering.wait())
        await asyncio.wait((self._task, answering), return_when=asyncio.FIRST_COMPLETED)
        if not self._uvicorn.answering.is_set():
            answering.cancel()
            self._socket.close()
            self._task.result()
            raise InferenceError("the application refused to start; the log says why")

    async def retire(self) -> None:
        """Leave a shared port without cutting a connection, while others go on listening.

        What waits at a socket that is closed is reset. So new connections are no more let in
        first (their callers try again within a second or so, and reach another process), those
        under way arrive, and then the socket closes. Who is connected hears with its next answer
        that the connection ends. `stop` does this too, and then ends those that asked nothing.
        """
        assert self._socket is not None, "the server has not been started"
        if self._has_retired:
            return
        self._has_retired = True
        # Kept by uvicorn for the answers of the next seconds, and used for those of this one.
        self._uvicorn.config.encoded_headers.append(_CLOSE)
        self._uvicorn.server_state.default_headers.append(_CLOSE)
        if _let_nobody_in(self._socket):
            await asyncio.sleep(_SETTLE_S)
        for server in self._uvicorn.servers:
            server.close()
        self._socket.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                while self._uvicorn.server_state.connections:
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Finish the requests in flight, then close; does nothing if never started."""
        if self._task is not None:
            if self._is_shared:
                await self.retire()
            self._uvicorn.should_exit = True
            await self._task
            self._task = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Take a port, and wait for connections.

    Args:
        host: the address.
        port: the port; 0 takes a free one.
        shared: let other processes of this user do so too.

    Raises:
        PortInUseError: someone else has it.
        InferenceError: the address is not one of this machine, or the port needs privileges.
    """
    taken = take_port(host, port, shared=shared)
    try:
        taken.listen(_BACKLOG)
    except OSError as error:  # who shares ports may have bound it without listening
        taken.close()
        raise _untakeable(host, port, error) from error
    return taken


def take_port(host: str, port: int, *, shared: bool) -> socket.socket:
    """Take a port without listening; see `listen`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once only on sockets that name their protocol; else each
    # waits 40 ms for the acknowledgement of the one before.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Connections of a server that just ended linger in TIME_WAIT; they are no reason to fail.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise _untakeable(host, port, error) from error
    return taken


def _untakeable(host: str, port: int, error: OSError) -> InferenceError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {port} on {host} is in use: stop what listens there, "
            "or choose another port (0 takes a free one)"
        )
    return InferenceError(
        f"cannot listen on {host}:{port}: {error.strerror or error}; choose another address"
    )


def _let_nobody_in(listening: socket.socket) -> bool:
    """Let the system drop what would open a connection; tell whether it does.

    Linux keeps a connection with the socket that it was hashed to, so there is no other way for a
    process to leave a group of sockets without losing what arrives in that moment (K. Iwashima,
    "Socket migration for SO_REUSEPORT", Linux 5.14; its sysctl is the administrator's).
    """
    code = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
    program = struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(code))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
    except OSError:  # not Linux, or a sandbox
        return False
    return True


def is_everywhere(host: str) -> bool:
    """Tell whether an address means all interfaces."""
    return host in ("0.0.0.0", "::", "")  # noqa: S104 - compared with, not listened on


def url_host(host: str) -> str:
    """Write a listening address as clients on this machine name it in a URL."""
    if is_everywhere(host):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class _Uvicorn(uvicorn.Server):
    """uvicorn that leaves signals alone and says when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
