"""The enrolment port's gRPC service: unpacks, asks the `Enroller`, packs."""

from collections.abc import Callable

from minga.federation.coordinator.enrolment import Enroller
from minga.federation.errors import EnrolmentError
from minga.federation.interception import Context
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

OnRefused = Callable[[pb.EnrollRequest, str, EnrolmentError], None]
"""Hears of a refusal: the request, the caller's address, why."""


def _pass_over(request: pb.EnrollRequest, peer: str, error: EnrolmentError) -> None:
    """Hear of a refusal and do nothing."""


class EnrolmentServicer(pb_grpc.EnrollmentServiceServicer):
    """Answers strangers with a token; errors reach them through `transport.ErrorInterceptor`."""

    def __init__(self, enroller: Enroller, on_refused: OnRefused = _pass_over) -> None:
        self._enroller = enroller
        self._on_refused = on_refused

    async def Enroll(
        self,
        request: pb.EnrollRequest,
        context: Context,
    ) -> pb.EnrollResponse:
        """Redeem a token for a certificate."""
        try:
            enrolled = self._enroller.enrol(
                request.token_secret, request.device_name, request.certificate_signing_request
            )
        except EnrolmentError as error:
            self._on_refused(request, context.peer(), error)
            raise
        return pb.EnrollResponse(
            certificate=enrolled.chain_der,
            authority_certificate=enrolled.authority_der,
            device_id=enrolled.device_id,
        )
