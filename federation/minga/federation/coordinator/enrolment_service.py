"""The enrolment port's gRPC service: unpacks, asks the `Enroller`, packs."""

from minga.federation.coordinator.enrolment import Enroller
from minga.federation.interception import Context
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc


class EnrolmentServicer(pb_grpc.EnrollmentServiceServicer):
    """Answers strangers with a token; errors reach them through `transport.ErrorInterceptor`."""

    def __init__(self, enroller: Enroller) -> None:
        self._enroller = enroller

    async def Enroll(
        self,
        request: pb.EnrollRequest,
        context: Context,
    ) -> pb.EnrollResponse:
        """Redeem a token for a certificate."""
        enrolled = self._enroller.enrol(
            request.token_secret, request.device_name, request.certificate_signing_request
        )
        return pb.EnrollResponse(
            certificate=enrolled.certificate_der,
            authority_certificate=enrolled.authority_der,
            device_id=enrolled.device_id,
        )
