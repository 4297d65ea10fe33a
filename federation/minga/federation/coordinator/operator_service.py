"""What operators may ask of the coordinator."""

import asyncio
import resource
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import grpc

from minga.federation.aggregation.ledger import load_accounting
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.access import principal_of_call
from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.calls import RunningCalls
from minga.federation.coordinator.campaigns import Campaigns
from minga.federation.coordinator.credentials import OwnIdentity
from minga.federation.coordinator.hub import Connection, Hub
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.models import PublishedModels
from minga.federation.coordinator.store import DeviceRow, Store
from minga.federation.errors import CampaignError, MissingDeviceError, PeerError, PrivacyError
from minga.federation.limits import PAGE_DEVICES
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.federation.wire import condition_to_wire, printable, privacy_from_wire, timestamp

Context = grpc.aio.ServicerContext[Any, Any]


class OperatorService(pb_grpc.OperatorServiceServicer):
    """Tokens, devices, campaigns, models. Errors become statuses in the interceptor."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        hub: Hub,
        campaigns: Campaigns,
        models: PublishedModels,
        metrics: Metrics,
        audit: AuditLog,
        mint_token: Callable[[str, float, str], tuple[str, float]],
        own_identities: Mapping[str, OwnIdentity],
        calls: RunningCalls,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._hub = hub
        self._campaigns = campaigns
        self._models = models
        self._metrics = metrics
        self._audit = audit
        self._mint_token = mint_token
        self._own_identities = own_identities
        self._calls = calls
        self._clock = clock
        self._started_at = clock()

    async def CreateToken(
        self, request: pb.CreateTokenRequest, context: Context
    ) -> pb.CreateTokenResponse:
        """Make a token; it is shown this once."""
        token, expires_at = self._mint_token(
            request.group, float(request.lifetime_s), principal_of_call(context).path
        )
        return pb.CreateTokenResponse(token=token, expires_at=timestamp(expires_at))

    async def ListDevices(
        self, request: pb.ListDevicesRequest, context: Context
    ) -> pb.ListDevicesResponse:
        """List one page of devices."""
        rows = self._store.devices(request.group, after=request.after, most=PAGE_DEVICES + 1)
        return pb.ListDevicesResponse(
            devices=[self._device(row) for row in rows[:PAGE_DEVICES]],
            has_more=len(rows) > PAGE_DEVICES,
        )

    def _device(self, row: DeviceRow) -> pb.Device:
        connection = self._hub.connection(row.device_id)
        return pb.Device(
            device_id=row.device_id,
            group=row.group,
            connected=connection is not None,
            revoked=row.revoked_at is not None,
            trains=row.trains,
            enrolled_at=timestamp(row.enrolled_at),
            last_seen_at=timestamp(connection.heard_at if connection else row.last_seen_at),
            model=pb.ModelReport.FromString(row.model) if row.model else None,
            rounds_counted=row.rounds_counted,
            agent_version=row.agent_version,
            condition=_condition(connection),
        )

    async def RevokeDevice(
        self, request: pb.RevokeDeviceRequest, context: Context
    ) -> pb.RevokeDeviceResponse:
        """Refuse a device, end its calls and stream, go on with the round without it."""
        with self._store.transaction():
            if not self._store.revoke_device(request.device_id, self._clock()):
                raise MissingDeviceError(
                    f"there is no device {request.device_id!r}; `minga device list` lists them"
                )
            self._audit.append(
                Kind.DEVICE_REVOKED,
                f"device/{request.device_id}",
                by=principal_of_call(context).path,
            )
        self._metrics.enrolled.set(self._store.num_enrolled())
        self._hub.drop(request.device_id)
        self._calls.end(f"device/{request.device_id}")
        self._campaigns.lose(request.device_id, "revoked by an operator")
        return pb.RevokeDeviceResponse()

    async def RevokeIdentity(
        self, request: pb.RevokeIdentityRequest, context: Context
    ) -> pb.RevokeIdentityResponse:
        """Give one of the coordinator's own identities another key and refuse the one before."""
        identity = self._own_identities.get(request.identity)
        if identity is None:
            raise PeerError(
                f"{printable(request.identity)[:80]!r} is no identity of the coordinator's own, "
                f"which are {', '.join(sorted(self._own_identities))}"
            )
        before = identity.key_digest
        # First the key, then the entry: a crash in between must not leave the key that counted. Who
        # asks again is answered, and then it is written.
        identity.replace_key()
        self._audit.append(
            Kind.IDENTITY_REVOKED,
            request.identity,
            key=before.hex(),
            replaced_by=identity.key_digest.hex(),
            by=principal_of_call(context).path,
        )
        self._audit.sign()
        self._calls.end(request.identity)
        return pb.RevokeIdentityResponse(key_digest=before)

    async def StartCampaign(
        self, request: pb.StartCampaignRequest, context: Context
    ) -> pb.StartCampaignResponse:
        """Start a campaign."""
        # Off the loop: it may load code and make a strategy.
        await asyncio.to_thread(self._campaigns.strategies.require_possible, request.plan)
        with suppress(PrivacyError):  # of a plan that is refused below
            if privacy_from_wire(request.plan) is not None:
                await asyncio.to_thread(load_accounting)
        campaign = self._campaigns.start(request.plan, principal_of_call(context).path)
        return pb.StartCampaignResponse(campaign_id=campaign.campaign_id)

    async def WatchCampaign(
        self, request: pb.WatchCampaignRequest, context: Context
    ) -> AsyncIterator[pb.WatchCampaignResponse]:
        """Stream a campaign's state until it ends."""
        async for campaign in self._campaigns.watch(request.campaign_id):
            yield pb.WatchCampaignResponse(campaign=campaign)

    async def CancelCampaign(
        self, request: pb.CancelCampaignRequest, context: Context
    ) -> pb.CancelCampaignResponse:
        """Stop a campaign."""
        self._campaigns.cancel(request.campaign_id, principal_of_call(context).path)
        return pb.CancelCampaignResponse()

    async def PublishModel(
        self, request: pb.PublishModelRequest, context: Context
    ) -> pb.PublishModelResponse:
        """Offer an uploaded model to devices."""
        if not self._blobs.has(request.model.digest):
            raise CampaignError("the model is not uploaded; upload it before publishing it")
        num_devices = self._models.publish(
            request.model, request.group, principal_of_call(context).path
        )
        return pb.PublishModelResponse(num_devices=num_devices)

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """Tell what goes on."""
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return pb.GetStatusResponse(
            version=version("minga"),
            started_at=timestamp(self._started_at),
            num_devices=self._store.num_devices(),
            num_connected=len(self._hub),
            campaigns=self._campaigns.describe(),
            peak_memory_bytes=peak_kib * 1024,
            models=[
                pb.PublishModelRequest(model=offer, group=group)
                for group, offer in self._models.all()
            ],
        )


def _condition(connection: Connection | None) -> pb.Condition | None:
    if connection is None or connection.condition is None:
        return None
    return condition_to_wire(connection.condition)
