"""The operator's side: a client of the coordinator's OperatorService.

An operator is whoever holds an operator's identity folder; a coordinator keeps one in its state
folder.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from minga.federation import transfer, transport
from minga.federation.durable import replace_file
from minga.federation.errors import IdentityError, UnreachableError
from minga.federation.identity import holds_identity, load_identity
from minga.federation.limits import CALL_TIMEOUT_S
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from minga.federation.v1.federation_pb2_grpc import (
        OperatorServiceAsyncStub,
    )

OPERATOR_FOLDER = "operator"
ADDRESS_FILE = "coordinator.json"


def write_address(folder: Path, address: str) -> None:
    """Note beside an operator's identity where its coordinator is."""
    replace_file(folder / ADDRESS_FILE, json.dumps({"address": address}).encode())


class Operator:
    """An open connection to a coordinator; make one with `connect`."""

    def __init__(
        self, stub: "OperatorServiceAsyncStub", blobs: transfer.BlobStub, address: str
    ) -> None:
        self._stub = stub
        self._blobs = blobs
        self.address = address

    async def create_token(self, group: str, lifetime_s: int) -> pb.CreateTokenResponse:
        """Make a one-time enrolment token."""
        request = pb.CreateTokenRequest(group=group, lifetime_s=lifetime_s)
        with transport.calling(self.address):
            return await self._stub.CreateToken(request, timeout=CALL_TIMEOUT_S)

    async def devices(self, group: str = "") -> list[pb.Device]:
        """List the devices of a group, or all, by name."""
        devices: list[pb.Device] = []
        has_more = True
        while has_more:
            after = devices[-1].device_id if devices else ""
            request = pb.ListDevicesRequest(group=group, after=after)
            with transport.calling(self.address):
                response = await self._stub.ListDevices(request, timeout=CALL_TIMEOUT_S)
            devices += response.devices
            has_more = response.has_more and bool(response.devices)
        return devices

    async def revoke(self, device_id: str) -> None:
        """Refuse a device from now on."""
        request = pb.RevokeDeviceRequest(device_id=device_id)
        with transport.calling(self.address):
            await self._stub.RevokeDevice(request, timeout=CALL_TIMEOUT_S)

    async def revoke_identity(self, identity: str) -> bytes:
        """Refuse the key that one of the coordinator's own identities has; it gets another one.

        Args:
            identity: `operator/operator` or `service/audit`.

        Returns:
            SHA-256 of the key that is refused, 32 bytes.
        """
        request = pb.RevokeIdentityRequest(identity=identity)
        with transport.calling(self.address):
            response = await self._stub.RevokeIdentity(request, timeout=CALL_TIMEOUT_S)
        return response.key_digest

    async def start_campaign(self, plan: pb.CampaignPlan, model: bytes) -> str:
        """Upload a model (safetensors) and start a campaign from it; gives its name."""
        plan.model_digest = await self._upload(model)
        return await self.start_query(plan)

    async def start_query(self, plan: pb.CampaignPlan) -> str:
        """Start a campaign that finds out what its plan's query says; gives its name."""
        with transport.calling(self.address):
            response = await self._stub.StartCampaign(
                pb.StartCampaignRequest(plan=plan), timeout=CALL_TIMEOUT_S
            )
        return response.campaign_id

    async def watch(
        self, campaign_id: str, retry: transfer.Retry | None = None
    ) -> AsyncIterator[pb.Campaign]:
        """Give a campaign's state now and after each change, until it ends.

        A link that breaks, or a coordinator that starts again, is waited for.

        Args:
            campaign_id: which campaign.
            retry: how patient to be with each silence.

        Yields:
            The whole state; after a silence perhaps one that was given before.

        Raises:
            CampaignError: there is no such campaign.
            UnreachableError: the coordinator stayed away.
        """
        retry = retry or transfer.Retry()
        failures = 0
        while True:
            call = self._stub.WatchCampaign(pb.WatchCampaignRequest(campaign_id=campaign_id))
            try:
                with transport.calling(self.address):
                    async for response in call:
                        failures = 0
                        yield response.campaign
                return
            except UnreachableError:
                failures += 1
                if failures >= retry.attempts:
                    raise
                await asyncio.sleep(retry.delay_s(failures))
            finally:
                call.cancel()  # one that is left open counts against the connection

    async def cancel(self, campaign_id: str) -> None:
        """Stop a campaign."""
        request = pb.CancelCampaignRequest(campaign_id=campaign_id)
        with transport.calling(self.address):
            await self._stub.CancelCampaign(request, timeout=CALL_TIMEOUT_S)

    async def publish_model(self, name: str, version: str, model: bytes, group: str = "") -> int:
        """Upload an ONNX model and offer it to a group; gives how many devices hear of it now."""
        digest = await self._upload(model)
        offer = pb.ModelOffer(name=name, version=version, digest=digest)
        with transport.calling(self.address):
            response = await self._stub.PublishModel(
                pb.PublishModelRequest(model=offer, group=group), timeout=CALL_TIMEOUT_S
            )
        return response.num_devices

    async def read(self, digest: bytes) -> bytes:
        """Read a blob."""
        with TemporaryDirectory(prefix="minga-") as folder:
            path = Path(folder) / "blob"
            await transfer.download(self._blobs, digest, path, address=self.address)
            return path.read_bytes()

    async def status(self) -> pb.GetStatusResponse:
        """Ask what the coordinator is doing."""
        with transport.calling(self.address):
            return await self._stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_TIMEOUT_S)

    async def _upload(self, data: bytes) -> bytes:
        digest = transfer.digest_of(data)
        await transfer.upload(self._blobs, data, digest, address=self.address)
        return digest


def _read_address(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IdentityError(
            f"{file} does not say where the coordinator is ({error!r}); copy the coordinator's "
            f"{OPERATOR_FOLDER!r} folder again"
        ) from error


@asynccontextmanager
async def connect(folder: Path) -> AsyncIterator[Operator]:
    """Connect with the operator's identity in a folder, or in a coordinator's state folder.

    Raises:
        IdentityError: the folder holds none.
    """
    if holds_identity(folder / OPERATOR_FOLDER):
        folder = folder / OPERATOR_FOLDER
    if not holds_identity(folder):
        raise IdentityError(
            f"{folder} holds no operator identity; name the coordinator's state folder, "
            "or a copy of its 'operator' folder"
        )
    identity = load_identity(folder)
    address = _read_address(folder / ADDRESS_FILE)
    async with transport.open_channel(address, identity) as channel:
        yield Operator(pb_grpc.OperatorServiceStub(channel), transfer.BlobStub(channel), address)
