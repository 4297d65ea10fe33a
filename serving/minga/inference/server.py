"""An ASGI application on a port of this process, inside a running event loop.

uvicorn does the HTTP. What is added: the port is taken before anything else happens, so a
taken port is one clear error; signals stay with whoever owns the loop; `start` returns when
requests are answered and `stop` when the last one was.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Self

import uvicorn

from minga.inference.connections import guarded
from minga.inference.errors import InferenceError, PortInUseError
from minga.inference.tls import ServerTls

_BACKLOG: Final = 2048
_IDLE_CONNECTION_S: Final = 75  # longer than common clients keep one: they close, we do not
_DRAIN_S: Final = 10


class Server:
    """Serves one ASGI application over HTTP.

    Args:
        app: the application.
        host: the address to listen on.
        port: the port to listen on; 0 lets the system choose one.
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
        tls: ServerTls | None = None,
    ) -> None:
        self._host = host
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
        config.http_protocol_class = guarded(config.http_protocol_class)  # type: ignore[arg-type]
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

    async def start(self) -> None:
        """Listen, and return once requests are answered.

        Raises:
            PortInUseError: the port is taken.
        """
        self._socket = listen(self._host, self._wanted_port)
        self._task = asyncio.create_task(self._uvicorn.serve([self._socket]))
        answering = asyncio.create_task(self._uvicorn.answering.wait())
        await asyncio.wait((self._task, answering), return_when=asyncio.FIRST_COMPLETED)
        if not self._uvicorn.answering.is_set():
            answering.cancel()
            self._socket.close()
            self._task.result()
            raise InferenceError("the application refused to start; the log says why")

    async def stop(self) -> None:
        """Finish the requests in flight, then close; does nothing if never started."""
        if self._task is not None:
            self._uvicorn.should_exit = True
            await self._task
            self._task = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def listen(host: str, port: int) -> socket.socket:
    """Take a port.

    Raises:
        PortInUseError: someone else has it.
        InferenceError: the address is not one of this machine, or the port needs privileges.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once only on sockets that name their protocol; else each
    # waits 40 ms for the acknowledgement of the one before.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Connections of a server that just ended linger in TIME_WAIT; they are no reason to fail.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen(_BACKLOG)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} on {host} is in use: stop what listens there, "
                "or choose another port (0 takes a free one)"
            ) from error
        raise InferenceError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another address"
        ) from error
    return taken


def url_host(host: str) -> str:
    """Write a listening address as clients on this machine name it in a URL."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared with, not listened on
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
