"""The gRPC service on a port of this process, inside a running event loop."""

from types import TracebackType
from typing import Any, Final, Self

import grpc

from minga.inference.errors import PortInUseError
from minga.inference.grpc_service import GrpcService
from minga.inference.server import listen, url_host
from minga.inference.service import InferenceService

_DRAIN_S: Final = 10
_MAX_METADATA_BYTES: Final = 16 * 1024
_MAX_RPCS: Final = 1024  # at once; more are refused with RESOURCE_EXHAUSTED
_MAX_STREAMS: Final = 128  # at once on one connection; more wait
# A caller that says nothing for so long is asked whether it is still there.
_PING_S: Final = 60


class GrpcServer:
    """Serves one `InferenceService` over gRPC, without TLS.

    Args:
        service: what answers; shared with an `InferenceApp`, which ends it.
        host: the address to listen on.
        port: the port to listen on; 0 lets the system choose one.
        shared: let other processes listen on the same port; the system then gives each
            connection to one of them.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        host: str = "127.0.0.1",
        port: int = 8001,
        shared: bool = False,
    ) -> None:
        self._host = host
        self._wanted_port = port
        self._port = 0
        self._shared = shared
        self._service = service
        self._server: grpc.aio.Server | None = None

    @property
    def url(self) -> str:
        """Where clients reach the server, as `grpc://host:port`; only after `start`."""
        return f"grpc://{url_host(self._host)}:{self._port}"

    @property
    def is_started(self) -> bool:
        """Whether requests are answered."""
        return self._server is not None

    async def start(self) -> None:
        """Listen, and return once requests are answered.

        Raises:
            PortInUseError: the port is taken.
        """
        if not self._shared:
            listen(self._host, self._wanted_port).close()  # its errors say what to do
        server = grpc.aio.server(options=self._options(), maximum_concurrent_rpcs=_MAX_RPCS)
        server.add_generic_rpc_handlers((GrpcService(self._service).handlers(),))
        try:
            host = f"[{self._host}]" if ":" in self._host else self._host
            self._port = server.add_insecure_port(f"{host}:{self._wanted_port}")
        except RuntimeError as error:
            raise PortInUseError(
                f"cannot listen for gRPC on {self._host}:{self._wanted_port}; "
                "choose another port (0 takes a free one)"
            ) from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Finish the requests in flight, then close; does nothing if never started."""
        if self._server is not None:
            await self._server.stop(_DRAIN_S)
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def _options(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.so_reuseport", int(self._shared)),
            ("grpc.max_receive_message_length", self._service.limits.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", _MAX_STREAMS),
            ("grpc.keepalive_time_ms", _PING_S * 1000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]
