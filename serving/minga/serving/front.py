"""A replica's own servers, at ports that all replicas of a machine share.

They run on an event loop of a thread of their own, as they do without Ray: what Ray Serve asks a
replica never waits behind requests, nor they behind it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, TypedDict, TypeVar

import uvloop

from minga.inference.app import InferenceApp, Scope, Send
from minga.inference.bodies import Receive
from minga.inference.grpc_server import GrpcServer
from minga.inference.server import Server
from minga.inference.tls import ServerTls

_SAMPLE_S: Final = 0.05
_MAX_SAMPLES: Final = 1200
# Where KubeRay looks whether a pod may get requests, and what it wants to read there.
_PROBED: Final = "/-/healthz"
_WELL: Final = b"success"

T = TypeVar("T")


class Address(TypedDict):
    """Where replicas listen."""

    host: str
    port: int


class Front:
    """HTTP and gRPC of one application.

    Args:
        app: what answers.
        http: where it does over HTTP.
        grpc: where it does over gRPC; None means nowhere.
        tls: what both show; None means none.

    Raises:
        AccessError: TLS cannot be set up.
    """

    def __init__(
        self,
        app: InferenceApp,
        http: Address,
        grpc: Address | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self._http = Server(_Probed(app), **http, shared=True, tls=tls)
        self._grpc = GrpcServer(app.service, **grpc, shared=True, tls=tls) if grpc else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._samples: deque[int] = deque(maxlen=_MAX_SAMPLES)
        self._is_sampling = False

    @property
    def is_started(self) -> bool:
        """Whether requests are answered."""
        return self._loop is not None

    @property
    def url(self) -> str:
        """Where clients on this machine reach the models; only after `start`."""
        return self._http.url

    async def start(self) -> None:
        """Listen, and return once requests are answered.

        Raises:
            PortInUseError: someone who does not share has the port.
        """
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="minga-front", daemon=True
        )
        self._thread.start()
        try:
            await self.run(self._start())
        except BaseException:
            await self._end_thread()
            raise

    async def stop(self) -> None:
        """Take no more connections, answer what has been taken, and end."""
        await self.run(self._stop())
        await self._end_thread()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Let something run on the loop that answers requests; only while started."""
        assert self._loop is not None, "the servers have not been started"
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def mean_requests(self) -> float:
        """Tell how many requests were in hand on the mean since this was last asked."""
        if self._loop is not None and not self._is_sampling:
            self._is_sampling = True
            self._loop.call_soon_threadsafe(self._sample)
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        return sum(samples) / len(samples) if samples else float(self._num_requests())

    def _num_requests(self) -> int:
        return self._http.num_requests + (self._grpc.num_requests if self._grpc else 0)

    def _sample(self) -> None:
        # A timer's callback runs before the requests that have just been read, so it sees them.
        self._samples.append(self._num_requests())
        asyncio.get_running_loop().call_later(_SAMPLE_S, self._sample)

    async def _start(self) -> None:
        await self._http.start()
        if self._grpc is not None:
            try:
                await self._grpc.start()
            except BaseException:
                await self._http.stop()
                raise

    async def _stop(self) -> None:
        """End both ways in at once; the application ends with the one for HTTP."""
        others = [self._grpc.stop()] if self._grpc else []
        await asyncio.gather(self._http.retire(), *others)
        await self._http.stop()

    async def _end_thread(self) -> None:
        assert self._loop is not None, "the servers have not been started"
        assert self._thread is not None, "the servers have not been started"
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(self._thread.join)
        loop.close()


class _Probed:
    """An application that answers KubeRay's probe too, which asks for Ray Serve's own proxy."""

    def __init__(self, app: InferenceApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _PROBED:
            await self._app(scope, receive, send)
            return
        length = (b"content-length", str(len(_WELL)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        body = b"" if scope["method"] == "HEAD" else _WELL
        await send({"type": "http.response.body", "body": body})
