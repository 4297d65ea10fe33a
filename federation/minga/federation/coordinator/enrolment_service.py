"""The enrolment port's gRPC service: counts, unpacks, asks the `Enroller`, packs.

Anybody may ask here, and each answer takes the event loop a signature's time, on which the rounds
wait too. So each address has a rate, and all of them together have one.
"""

from collections.abc import Callable
from ipaddress import ip_network
from urllib.parse import unquote

from minga.federation.coordinator.enrolment import Enroller
from minga.federation.coordinator.rate import Buckets
from minga.federation.errors import EnrolmentError, FederationError, LimitError
from minga.federation.interception import Context
from minga.federation.limits import ALL_ENROLMENTS_PER_S, ENROLMENTS_PER_S
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

OnRefused = Callable[[pb.EnrollRequest, str, FederationError], None]
"""Hears of a refusal: the request, the caller's address, why."""


def _pass_over(request: pb.EnrollRequest, peer: str, error: FederationError) -> None:
    """Hear of a refusal and do nothing."""


class EnrolmentServicer(pb_grpc.EnrollmentServiceServicer):
    """Answers strangers with a token; errors reach them through `transport.ErrorInterceptor`.

    Args:
        enroller: Who decides.
        on_refused: Hears of refusals.
        enrolments_per_s: How many one address may ask for.
    """

    def __init__(
        self,
        enroller: Enroller,
        on_refused: OnRefused = _pass_over,
        *,
        enrolments_per_s: float = ENROLMENTS_PER_S,
    ) -> None:
        self._enroller = enroller
        self._on_refused = on_refused
        self._each = Buckets[str](per_s=enrolments_per_s)
        share = ALL_ENROLMENTS_PER_S / ENROLMENTS_PER_S
        self._all = Buckets[None](per_s=share * enrolments_per_s)

    async def Enroll(
        self,
        request: pb.EnrollRequest,
        context: Context,
    ) -> pb.EnrollResponse:
        """Redeem a token for a certificate."""
        try:
            self._require_allowed(address_of(context.peer()))
            enrolled = self._enroller.enrol(
                request.token_secret, request.device_name, request.certificate_signing_request
            )
        except (EnrolmentError, LimitError) as error:
            self._on_refused(request, context.peer(), error)
            raise
        return pb.EnrollResponse(
            certificate=enrolled.chain_der,
            authority_certificate=enrolled.authority_der,
            device_id=enrolled.device_id,
        )

    def _require_allowed(self, address: str) -> None:
        if not self._each.allows(address):
            raise LimitError(
                f"more than {self._each.per_s:g} enrolments a second come from {address}; "
                "try again in a few seconds"
            )
        if not self._all.allows(None):
            raise LimitError("too many devices enrol at this moment; try again in a few seconds")


def address_of(peer: str) -> str:
    """Give a caller's address without its port, from gRPC's `ipv4:192.0.2.7:4711`.

    An IPv6 address is cut to the network of 64 bits that one customer has at the least (RFC 6177).
    """
    kind, _, rest = peer.partition(":")
    host = unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]
    if kind != "ipv6":
        return host or peer
    try:
        return str(ip_network((host, 64), strict=False))
    except ValueError:
        return host
