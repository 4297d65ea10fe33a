"""The devices' renewal service: unpacks, asks the `Renewer`, writes it down, packs."""

from minga.federation.audit import format_time
from minga.federation.coordinator.access import principal_of_call
from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.rate import Rate
from minga.federation.coordinator.renewal import Renewer
from minga.federation.errors import FederationError, LimitError
from minga.federation.interception import Context
from minga.federation.limits import MAX_RENEWALS_PER_MINUTE
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc


class IdentityServicer(pb_grpc.IdentityServiceServicer):
    """Renews the caller's certificate; errors reach it through `transport.ErrorInterceptor`."""

    def __init__(self, renewer: Renewer, audit: AuditLog, rate: Rate[str]) -> None:
        self._renewer = renewer
        self._audit = audit
        self._rate = rate

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Issue a new certificate to the caller."""
        device = principal_of_call(context)
        try:
            if not self._rate.allows(device.path):
                raise LimitError(
                    f"{device} asked for more than {MAX_RENEWALS_PER_MINUTE} certificates "
                    "within a minute; use the one from before"
                )
            certificate = self._renewer.renew(device.name, request.certificate_signing_request)
        except FederationError as error:
            self._audit.append_limited(Kind.RENEWAL_REFUSED, device.path, reason=str(error))
            raise
        self._audit.append(
            Kind.DEVICE_RENEWED,
            device.path,
            serial=f"{certificate.serial_number:x}",
            replaces=f"{device.serial:x}",
            valid_until=format_time(certificate.not_valid_after_utc),
        )
        return pb.RenewResponse(certificate=self._renewer.authority.chain_of(certificate))
