"""The gRPC service on a port of this process, inside a running event loop."""

from typing import Any, Final, Self

import grpc

from minga.inference.errors import PortInUseError
from minga.inference.grpc_service import Doorkeeper, GrpcService
from minga.inference.server import listen, url_host
from minga.inference.service import InferenceService
from minga.inference.tls import ServerTls

_DRAIN_S: Final = 10
_MAX_METADATA_BYTES: Final = 16 * 1024
_MAX_RPCS: Final = 1024  # at once; more are refused with RESOURCE_EXHAUSTED
_MAX_STREAMS: Final = 128  # at once on one connection; more wait
_MAX_AGE_S: Final = 30  # of a connection to a port that is shared, so that all processes get some
# A caller that says nothing for so long is asked whether it is still there.
_PING_S: Final = 60


class GrpcServer:
    """Serves one `InferenceService` over gRPC.

    Args:
        service: what answers; shared with an `InferenceApp`, which ends it.
        host: the address to listen on.
        port: the port to listen on; 0 lets the system choose one.
        shared: let other processes listen on the same port; the system then gives each
            connection to one of them.
        tls: what the server shows; None means none.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        host: str = "127.0.0.1",
        port: int = 8001,
        shared: bool = False,
        tls: ServerTls | None = None,
    ) -> None:
        self._host = host
        self._tls = tls
        self._wanted_port = port
        self._port = 0
        self._shared = shared
        self._service = service
        self._methods = GrpcService(service)
        self._server: grpc.aio.Server | None = None

    @property
    def url(self) -> str:
        """Where clients reach the server, as `grpc://host:port`; only after `start`."""
        return f"{'grpcs' if self._tls else 'grpc'}://{url_host(self._host)}:{self._port}"

    @property
    def is_started(self) -> bool:
        """Whether requests are answered."""
        return self._server is not None

    @property
    def num_requests(self) -> int:
        """How many requests are in hand: they have begun, and their answers have not gone."""
        return self._methods.num_requests

    async def start(self) -> None:
        """Listen, and return once requests are answered.

        Raises:
            PortInUseError: the port is taken.
            AccessError: TLS cannot be set up.
        """
        credentials = self._tls.credentials() if self._tls else None
        if not self._shared:
            listen(self._host, self._wanted_port).close()  # its errors say what to do
        server = grpc.aio.server(
            interceptors=self._interceptors(),
            options=self._options(),
            maximum_concurrent_rpcs=_MAX_RPCS,
        )
        server.add_generic_rpc_handlers(self._methods.handlers())
        try:
            host = f"[{self._host}]" if ":" in self._host else self._host
            address = f"{host}:{self._wanted_port}"
            self._port = (
                server.add_secure_port(address, credentials)
                if credentials
                else server.add_insecure_port(address)
            )
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

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        access = self._service.access
        if access.is_open:
            return []
        # With a client CA the handshake lets nobody through without a certificate.
        return [Doorkeeper(access, certified=bool(self._tls and self._tls.client_ca))]

    def _options(self) -> list[tuple[str, Any]]:
        age = [("grpc.max_connection_age_ms", _MAX_AGE_S * 1000)] if self._shared else []
        return [
            *age,
            ("grpc.so_reuseport", int(self._shared)),
            ("grpc.max_receive_message_length", self._service.limits.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", _MAX_STREAMS),
            ("grpc.keepalive_time_ms", _PING_S * 1000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]
