"""Who was revoked gets nothing more: no call, and none that runs already."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from minga.federation import audit, transport
from minga.federation.audit import Checkpoint, Entry
from minga.federation.certificates import load_certificate
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.calls import RunningCalls
from minga.federation.errors import AuditError, FederationError, IdentityError, PeerError
from minga.federation.identity import Identity, Principal, load_identity, utc_now
from minga.federation.limits import MIB
from minga.federation.operator import Operator, connect
from minga.federation.transfer import digest_of
from minga.federation.transport import calling, open_channel
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.blobs.depot import Depot
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan

Download = grpc.aio.UnaryStreamCall[pb.DownloadRequest, pb.DownloadResponse]
SOON_S = 5.0
STATE = "coordinator"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator without devices."""
    async with Fleet(tmp_path) as fleet:
        yield fleet


def log_of(fleet: Fleet) -> list[Entry]:
    """Read the coordinator's audit log."""
    records = read_log(fleet.folder / STATE / "coordinator.db")
    return [record for record in records if isinstance(record, Entry)]


async def ended(work: Awaitable[object]) -> FederationError:
    """Wait until a call that runs ends, soon, with an error."""
    with pytest.raises(FederationError) as caught, calling("coordinator"):
        await asyncio.wait_for(work, SOON_S)
    return caught.value


# -- operators --------------------------------------------------------------------------------


async def watch(operator: Operator, campaign_id: str, seen: asyncio.Event) -> None:
    """Watch a campaign that does not end."""
    async for _ in operator.watch(campaign_id):
        seen.set()


async def test_a_stolen_operator_s_key_opens_nothing_more(fleet: Fleet, tmp_path: Path) -> None:
    """Its open stream ends, its next call is refused, also after a restart; the new key works."""
    shutil.copytree(tmp_path / STATE / "operator", tmp_path / "stolen")
    campaign_id = await fleet.start_campaign(campaign_plan())  # waits for devices that never come
    async with connect(tmp_path / "stolen") as thief:
        seen = asyncio.Event()
        watching = asyncio.create_task(watch(thief, campaign_id, seen))
        await asyncio.wait_for(seen.wait(), PATIENCE_S)
        key = await fleet.operator.revoke_identity("operator/operator")
        error = await ended(watching)
        assert isinstance(error, IdentityError), error
        for operator in (thief, fleet.operator):  # the one who asked has the old key, too
            with pytest.raises(IdentityError, match="operator 'operator' was revoked"):
                await operator.status()
        async with connect(tmp_path / STATE) as again:
            await again.cancel(campaign_id)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
        await fleet.operator.status()
    async with connect(tmp_path / "stolen") as thief:
        (tmp_path / "stolen" / "coordinator.json").write_bytes(
            (tmp_path / STATE / "operator" / "coordinator.json").read_bytes()
        )
        with pytest.raises(IdentityError, match="was revoked"):
            await thief.create_token("default", 600)
    (entry,) = [entry for entry in log_of(fleet) if entry.kind == Kind.IDENTITY_REVOKED]
    assert entry.subject == entry.details["by"] == "operator/operator"
    assert entry.details["key"] == key.hex() != entry.details["replaced_by"]
    refused = [entry for entry in log_of(fleet) if entry.kind == Kind.ACCESS_REFUSED]
    assert any("WatchCampaign" in entry.details["method"] for entry in refused)


async def test_a_folder_that_was_made_anew_is_another_identity(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Without a coordinator that runs: remove the folder, start again; copies count no more."""
    shutil.copytree(tmp_path / STATE / "operator", tmp_path / "stolen")
    await fleet.stop_coordinator()
    shutil.rmtree(tmp_path / STATE / "operator")
    await fleet.start_coordinator()
    await fleet.operator.status()
    async with connect(tmp_path / "stolen") as thief:
        with pytest.raises(IdentityError, match="was revoked"):
            await thief.status()


@pytest.mark.parametrize("name", ["operator/ana", "device/press-7", "", "service/\x1b[31m"])
async def test_only_the_coordinator_s_own_identities_have_another_key(
    fleet: Fleet, name: str
) -> None:
    """Other names are refused with those that there are."""
    with pytest.raises(PeerError, match="operator/operator, service/audit"):
        await fleet.operator.revoke_identity(name)


# -- the audit log's key ----------------------------------------------------------------------


async def test_a_stolen_audit_key_signs_nothing_more(fleet: Fleet, tmp_path: Path) -> None:
    """The log goes on with another key and verifies; what the old one signs after that does not."""
    stolen = load_identity(tmp_path / STATE / "audit")
    await fleet.operator.revoke_identity("service/audit")
    await fleet.stop_coordinator()
    authority = load_certificate(tmp_path / STATE / "authority" / "authority.pem")
    records = list(read_log(tmp_path / STATE / "coordinator.db"))
    report = audit.verify(records, authority)
    assert report.signed_until == report.num_entries

    last, (*_, before) = records[-1], [r for r in records[:-1] if isinstance(r, Checkpoint)]
    assert isinstance(last, Checkpoint)
    forged = Checkpoint.signed(
        stolen,
        sequence=last.sequence,
        digest=last.hash,
        time=utc_now(),
        previous=before.sequence,
    )
    with pytest.raises(AuditError, match="by a key that was revoked"):
        audit.verify([*records[:-1], forged], authority)
    await fleet.start_coordinator()


# -- calls that run ---------------------------------------------------------------------------


async def test_a_download_of_a_revoked_device_ends(fleet: Fleet, tmp_path: Path) -> None:
    """Whether it reads on or not: the model that it was about to get does not come whole."""
    model = os.urandom(32 * MIB)
    await fleet.operator.publish_model("large", "1", model)
    await fleet.enrol("mallory")
    identity = load_identity(tmp_path / "mallory")
    async with transport.open_channel(fleet.operator.address, identity) as channel:
        request = pb.DownloadRequest(digest=digest_of(model))
        idle, busy = (pb_grpc.BlobServiceStub(channel).Download(request) for _ in range(2))
        for call in (idle, busy):
            assert await call.read()
        await fleet.operator.revoke("mallory")
        await ended(rest_of(busy))
        await ended(rest_of(idle))
        error = await ended(rest_of(pb_grpc.BlobServiceStub(channel).Download(request)))
        assert isinstance(error, IdentityError), error


async def rest_of(call: Download) -> None:
    """Read a download to its end."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_an_upload_of_a_revoked_device_ends(
    serve: Callable[..., Awaitable[str]], issue: Callable[..., Identity], tmp_path: Path
) -> None:
    """Though it says nothing more; others' uploads go on, and what came stays for nobody."""
    depot, calls = Depot(tmp_path / "blobs"), RunningCalls()
    revoked: set[str] = set()

    def is_revoked(principal: Principal) -> bool:
        return principal.name in revoked

    address = await serve(depot.add_services, calls=calls, is_revoked=is_revoked)
    data = os.urandom(MIB)
    header = pb.UploadRequest(header=pb.UploadHeader(digest=digest_of(data), size=len(data)))
    async with (
        open_channel(address, issue("press-7")) as seven,
        open_channel(address, issue("press-8")) as eight,
    ):
        uploads = [pb_grpc.BlobServiceStub(channel).Upload() for channel in (seven, eight)]
        for upload in uploads:
            await upload.write(header)
            await upload.initial_metadata()  # the coordinator waits for chunks
        revoked.add("press-7")
        calls.end("device/press-7")
        error = await ended(uploads[0])
        assert isinstance(error, IdentityError), error
        assert "device 'press-7' was revoked" in str(error)
        await uploads[1].write(pb.UploadRequest(chunk=data))
        await uploads[1].done_writing()
        assert (await uploads[1]).size == len(data)
        assert depot.received == {"press-7": 0, "press-8": len(data)}
