"""Channels and servers: TLS, options, and how errors cross the wire.

An error of ours crosses as a status code for strangers' eyes, its message, and its key in the
trailing metadata `minga-error`, from which the other side makes the same class again. gRPC's own
failures carry no key and are told by status and, where TLS failed, by the text of the library.

A server that refuses a client's certificate just closes the connection: in TLS 1.3 the client's
handshake is over by then, and it sees no reason. Therefore `open_channel` checks the certificate
against the authority before it dials: what the server would refuse is told here, with its reason.
"""

import errno
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NoReturn

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from minga.federation import limits
from minga.federation.errors import (
    AccessError,
    BudgetError,
    CampaignError,
    EnrolmentError,
    FederationError,
    IdentityError,
    LimitError,
    MissingBlobError,
    MissingDeviceError,
    PeerError,
    PortInUseError,
    UnreachableError,
)
from minga.federation.identity import (
    Clock,
    Identity,
    ServerIdentity,
    utc_now,
    verify_certificate,
)
from minga.federation.interception import Context, Handler, around

_log = logging.getLogger(__name__)

Options = Sequence[tuple[str, Any]]

ERROR_KEY: Final = "minga-error"

ACCEPTED_KEY: Final = "minga-accepted"
"""Key in the initial metadata of an upload whose chunks are welcome."""


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


_KEEPALIVE: Final[Options] = (
    ("grpc.keepalive_time_ms", _ms(limits.KEEPALIVE_INTERVAL_S)),
    ("grpc.keepalive_timeout_ms", _ms(limits.KEEPALIVE_TIMEOUT_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    # An idle stream carries no data for hours, and its probes must not stop after two.
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS: Final[Options] = (
    *_KEEPALIVE,
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", _ms(limits.FIRST_RECONNECT_BACKOFF_S)),
    ("grpc.max_reconnect_backoff_ms", _ms(limits.MAX_RECONNECT_BACKOFF_S)),
    # Channels of one process share neither connections nor each other's backoff.
    ("grpc.use_local_subchannel_pool", 1),
)


def at_most(num_connections: int) -> tuple[str, int]:
    """Give the option of a server that closes connections beyond so many at once."""
    return ("grpc.max_allowed_incoming_connections", num_connections)


_SERVER_OPTIONS: Final[Options] = (
    ("grpc.max_concurrent_streams", limits.MAX_STREAMS),
    ("grpc.server_handshake_timeout_ms", _ms(limits.HANDSHAKE_TIMEOUT_S)),
    # gRPC would share a port with another server in silence; see `require_free_port`.
    ("grpc.so_reuseport", 0),
)

SERVER_OPTIONS: Final[Options] = (
    *_KEEPALIVE,
    *_SERVER_OPTIONS,
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _ms(limits.MIN_KEEPALIVE_INTERVAL_S)),
    # Each connection keeps a buffer for one TLS record, 16 KiB without this: ten thousand idle
    # devices pay for it, and a blob that is sent in smaller records takes hardly longer.
    ("grpc.tsi.max_frame_size", limits.TLS_RECORD_BYTES),
)

ENROLMENT_SERVER_OPTIONS: Final[Options] = (
    *_SERVER_OPTIONS,
    ("grpc.max_receive_message_length", limits.MAX_ENROLMENT_MESSAGE_BYTES),
    ("grpc.max_connection_idle_ms", _ms(limits.IDLE_ENROLMENT_S)),
    at_most(limits.MAX_ENROLMENT_CONNECTIONS),
)


# -- connections ------------------------------------------------------------------------------


def open_channel(
    address: str, identity: Identity, *, clock: Clock = utc_now, any_intermediate: bool = False
) -> grpc.aio.Channel:
    """Open a mutual TLS channel; it dials on its first call and again whenever the link breaks.

    The coordinator must have its certificate from the identity's own issuer. TLS alone would take
    any intermediate of the root, the ones that were replaced too; so it is given the issuer to
    trust, and not the root.

    Args:
        address: `host:port` of the coordinator's device port.
        identity: Who calls, and who must have issued the coordinator's certificate.
        clock: The time to check the certificate by.
        any_intermediate: Trust the root itself instead: only to ask for a newer intermediate.

    Raises:
        IdentityError: the coordinator would refuse the certificate: foreign or expired.
    """
    verify_certificate(identity.certificate_der, identity.issuer, clock())
    trusted = identity.authority_pem if any_intermediate else identity.issuer_pem
    credentials = grpc.ssl_channel_credentials(
        trusted, identity.key_pem(), identity.certificate_pem
    )
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def open_pinned_channel(address: str, issuer: x509.Certificate) -> grpc.aio.Channel:
    """Open a TLS channel without a client certificate, to a server that the issuer knows.

    Args:
        address: `host:port` of the coordinator's enrolment port.
        issuer: The only one trusted; the machine's own authorities are not.
    """
    credentials = grpc.ssl_channel_credentials(issuer.public_bytes(Encoding.PEM))
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def mutual_server_credentials(source: Callable[[], ServerIdentity]) -> grpc.ServerCredentials:
    """Give a server's TLS that admits only holders of certificates of its authority.

    Args:
        source: Gives the newest key and certificate; asked at each handshake, from any thread.
            Connections that are open go on with what they were opened with.
    """
    return _server_credentials(source, is_mutual=True)


def open_server_credentials(source: Callable[[], ServerIdentity]) -> grpc.ServerCredentials:
    """Give a server's TLS that admits anybody: for the enrolment port alone.

    Args:
        source: As for `mutual_server_credentials`.
    """
    return _server_credentials(source, is_mutual=False)


def _server_credentials(
    source: Callable[[], ServerIdentity], *, is_mutual: bool
) -> grpc.ServerCredentials:
    shown = source()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        newest = source()
        if newest is shown:
            return None  # gRPC keeps what it has
        shown = newest
        return configure(newest)

    def configure(server: ServerIdentity) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(server.key_pem, server.certificate_pem)],
            root_certificates=server.authority_pem if is_mutual else None,
        )

    return grpc.dynamic_ssl_server_credentials(
        configure(shown),
        fetch,  # type: ignore[arg-type] # may give None, as its documentation says
        require_client_authentication=is_mutual,
    )


def require_free_port(host: str, port: int) -> None:
    """Make sure that nobody listens on a port, before anything is started; 0 is always free.

    Raises:
        PortInUseError: somebody listens.
        FederationError: the host is not of this machine, or the port is reserved.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: a port whose old connections are being forgotten counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} on {host} is in use by another process; "
                "stop that one or choose another port"
            ) from error
        raise FederationError(
            f"cannot listen on {host}:{port} ({error.strerror}); "
            "choose an address of this machine and a port above 1023"
        ) from error


# -- errors on the wire -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WireError:
    """One class of error on the wire."""

    key: str
    status: grpc.StatusCode
    error: type[FederationError]


WIRE_ERRORS: Final = (
    WireError("enrolment", grpc.StatusCode.FAILED_PRECONDITION, EnrolmentError),
    WireError("identity", grpc.StatusCode.UNAUTHENTICATED, IdentityError),
    WireError("access", grpc.StatusCode.PERMISSION_DENIED, AccessError),
    WireError("campaign", grpc.StatusCode.FAILED_PRECONDITION, CampaignError),
    WireError("budget", grpc.StatusCode.FAILED_PRECONDITION, BudgetError),
    WireError("missing-blob", grpc.StatusCode.NOT_FOUND, MissingBlobError),
    WireError("missing-device", grpc.StatusCode.NOT_FOUND, MissingDeviceError),
    WireError("limit", grpc.StatusCode.RESOURCE_EXHAUSTED, LimitError),
    WireError("peer", grpc.StatusCode.INVALID_ARGUMENT, PeerError),
    WireError("internal", grpc.StatusCode.INTERNAL, FederationError),
)
"""The one table of errors on the wire; an error crosses as its nearest class in here."""

_BY_KEY: Final = {row.key: row for row in WIRE_ERRORS}
_BY_CLASS: Final = {row.error: row for row in WIRE_ERRORS}
# What gRPC itself says. A server that stops cancels its calls: to the client it went away. UNKNOWN
# is what a call becomes whose bytes were damaged on the way; a server of ours says INTERNAL.
_BY_STATUS: Final[dict[grpc.StatusCode, type[FederationError]]] = {
    grpc.StatusCode.UNKNOWN: UnreachableError,
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnreachableError,
    grpc.StatusCode.CANCELLED: UnreachableError,
    grpc.StatusCode.UNAUTHENTICATED: IdentityError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitError,
    grpc.StatusCode.UNIMPLEMENTED: PeerError,
}

# What grpc.aio (1.85) says of a message that could not be sent because the call had ended; how it
# ended is not known yet by then.
_BROKEN_STREAM: Final = "Internal error from Core"

# Text in the reason of a connection that never came up -> what it means, first match first.
# The texts are BoringSSL's and gRPC's (1.85); where they change, the last row still holds.
_CONNECT_FAILURES: Final[tuple[tuple[str, type[FederationError], str], ...]] = (
    (
        "certificate has expired",
        IdentityError,
        "the certificate of the coordinator at {address} has expired; restart the coordinator, "
        "and check this machine's clock",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        IdentityError,
        "the server at {address} has a certificate that this identity does not trust: another "
        "federation's, or not a coordinator; check the address, or enrol with its token",
    ),
    (
        "Hostname Verification",
        IdentityError,
        "the certificate of the coordinator at {address} is not made out to that host; add the "
        "host to the coordinator's names, or dial one of them",
    ),
    (
        "Socket closed",
        UnreachableError,
        "the coordinator at {address} closed the connection at once: it is stopping, or it does "
        "not accept this certificate; check its log, then enrol again",
    ),
    (
        "",
        UnreachableError,
        "no coordinator answers at {address} ({reason}); start it, or check the address",
    ),
)


def wire_error_of(error: FederationError) -> WireError:
    """Give the row of the nearest class of an error."""
    return next(_BY_CLASS[kind] for kind in type(error).__mro__ if kind in _BY_CLASS)


async def abort_with(context: Context, error: FederationError) -> NoReturn:
    """End a call with an error that `error_of` makes again on the other side."""
    row = wire_error_of(error)
    message = str(error)[: limits.MAX_ERROR_MESSAGE_CHARS]
    await context.abort(row.status, message, trailing_metadata=((ERROR_KEY, row.key),))


def error_of(error: grpc.aio.AioRpcError, address: str) -> FederationError:
    """Turn what a call failed with into an error of ours.

    Args:
        error: What gRPC raised.
        address: Whom was called, for the message.
    """
    details = error.details() or error.code().name
    key = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
    if key in _BY_KEY:
        return _BY_KEY[key].error(details)
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        return _connect_failure(details, address)
    kind = _BY_STATUS.get(error.code(), FederationError)
    if details == _BROKEN_STREAM:
        kind = UnreachableError
    if kind is UnreachableError:
        return UnreachableError(
            f"the link to the coordinator at {address} broke ({details}); "
            "check that it runs and try again"
        )
    return kind(f"the coordinator at {address} answered {error.code().name}: {details}")


@contextmanager
def calling(address: str) -> Iterator[None]:
    """Turn gRPC's errors into ours inside a `with` block.

    Raises:
        FederationError: the class that the coordinator raised, `UnreachableError` or
            `IdentityError` if it was not reached.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error, address) from error


def _connect_failure(details: str, address: str) -> FederationError:
    # gRPC's text: "failed to connect to all addresses; last error: <STATUS>: <peer>: <reason>"
    reason = details.rpartition("last error: ")[2].split(": ", 2)[-1]
    for text, kind, message in _CONNECT_FAILURES:
        if text in details:
            return kind(message.format(address=address, reason=reason))
    raise AssertionError("the last row matches everything")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Sends the errors that handlers raise; the first one in a server's list of interceptors.

    What was not foreseen goes to the log with its traceback and to the caller without a word of
    its text, which could hold anything.
    """

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Put the translation around a call."""
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return None

        method: str = handler_call_details.method
        return around(handler, lambda context: _Reporting(method, context))


class _Reporting:
    """Translates what a call's handler raises.

    A class, and no generator: there is one for each open stream, of which most only wait.
    """

    __slots__ = ("_context", "_method")

    def __init__(self, method: str, context: Context) -> None:
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        """Let the handler begin."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Send what it raised; a cancellation goes its way."""
        if isinstance(error, FederationError):
            await abort_with(self._context, error)
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            _log.error("%s failed", self._method, exc_info=error)
            await abort_with(
                self._context, FederationError("the coordinator failed; its log says more")
            )
