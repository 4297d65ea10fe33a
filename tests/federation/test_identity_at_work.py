"""Renewal, rotation and the audit log of a coordinator and devices that are at work."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from minga.federation import audit, transport
from minga.federation.audit import Entry
from minga.federation.certificates import load_certificate
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.authority import Authority
from minga.federation.device.enrolment import enrol
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import AccessError, EnrolmentError, IdentityError
from minga.federation.identity import (
    load_identity,
)
from minga.federation.operator import connect
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.certificate_time import AGE, Time
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan, toy_model


@pytest.fixture
def time() -> Time:
    """The clock of all certificates."""
    return Time()


@pytest.fixture
async def fleet(tmp_path: Path, time: Time) -> AsyncIterator[Fleet]:
    """A coordinator without devices."""
    async with Fleet(tmp_path, certificate_clock=time, server_certificate_hours=720) as fleet:
        yield fleet


def log_of(fleet: Fleet) -> list[Entry]:
    """Read the coordinator's audit log, also while it runs."""
    records = read_log(fleet.folder / "coordinator" / "coordinator.db")
    return [record for record in records if isinstance(record, Entry)]


def subjects(fleet: Fleet, kind: Kind) -> list[str]:
    """Say whom entries of a kind are about."""
    return [entry.subject for entry in log_of(fleet) if entry.kind == kind]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


# -- renewal ----------------------------------------------------------------------------------


async def test_devices_renew_in_the_middle_of_a_round(
    fleet: Fleet, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    """Each goes over to a stream with its new certificate and keeps its part: the sum is exact."""
    caplog.set_level(logging.INFO, "minga.federation.device.agent")
    fleet.settings["reconnect_grace_s"] = 0.0  # whoever is away for a moment is lost
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    names = [f"site-{index}" for index in range(4)]
    for name in names:
        await fleet.add(name, {"step": 1.0, "num_examples": 100, "delay_s": 1.5})
    campaign_id = await fleet.start_campaign(campaign_plan())
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    old = {name: load_identity(fleet.folder / name).certificate for name in names}

    time.now += AGE
    await until(
        lambda: sorted(subjects(fleet, Kind.DEVICE_RENEWED)) == [f"device/{n}" for n in names]
    )
    campaign = await fleet.finish(campaign_id)

    (round_,) = campaign.rounds
    assert round_.stage == pb.ROUND_STAGE_COMMITTED, round_.reason
    assert list(round_.survivors) == names
    assert not round_.lost
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    for name, value in toy_model().items():
        np.testing.assert_allclose(result[name] - value, 1.0, atol=1e-6)
    assert not [record for record in caplog.records if "second stream" in record.message]
    assert sum("connected to" in record.message for record in caplog.records) == 2 * len(names)
    for name in names:
        assert load_identity(fleet.folder / name).certificate != old[name]
    assert (await fleet.operator.status()).num_connected == 4


async def test_an_old_certificate_is_renewed_when_the_device_connects(
    fleet: Fleet, time: Time
) -> None:
    """A device that was switched off until its certificate was due, and not longer."""
    await fleet.enrol("site-0")
    time.now += AGE
    fleet.start_device("site-0")
    await until(lambda: subjects(fleet, Kind.DEVICE_RENEWED) == ["device/site-0"])


async def test_a_revoked_device_gets_no_new_certificate(fleet: Fleet, time: Time) -> None:
    """It ends with the reason, and the refusal is in the log."""
    await fleet.enrol("site-0")
    await fleet.operator.revoke("site-0")
    time.now += AGE
    fleet.start_device("site-0")
    error = await fleet.device_ends("site-0")
    assert isinstance(error, IdentityError)
    assert "revoked" in str(error)
    refused = [entry for entry in log_of(fleet) if entry.kind == Kind.ACCESS_REFUSED]
    assert {entry.subject for entry in refused} == {"device/site-0"}
    assert "/minga.federation.v1.IdentityService/Renew" in {e.details["method"] for e in refused}
    assert not subjects(fleet, Kind.DEVICE_RENEWED)


async def test_an_expired_device_says_what_to_do(fleet: Fleet, time: Time) -> None:
    """A certificate that ends while the coordinator is away ends the agent with the remedy."""
    await fleet.add("site-0")
    await until(lambda: bool(subjects(fleet, Kind.DEVICE_ENROLLED)))
    await fleet.stop_coordinator()
    time.now += timedelta(days=31)
    error = await fleet.device_ends("site-0")
    assert isinstance(error, IdentityError)
    assert "enrol again with a new token" in str(error)
    time.now -= timedelta(days=31)
    await fleet.start_coordinator()


# -- the coordinator's own --------------------------------------------------------------------


async def test_the_coordinator_stays_valid_by_itself(fleet: Fleet, time: Time) -> None:
    """Server and operator get new certificates; who is connected stays, who comes gets in."""
    await fleet.add("site-0")
    await until(lambda: bool(subjects(fleet, Kind.DEVICE_ENROLLED)))
    operator = fleet.folder / "coordinator" / "operator"
    before = load_identity(operator).certificate
    fleet.coordinator.tend()
    assert load_identity(operator).certificate == before
    time.now += AGE
    fleet.coordinator.tend()
    assert load_identity(operator).certificate != before
    assert subjects(fleet, Kind.SERVER_CERTIFICATE_ISSUED) == ["coordinator"]
    assert subjects(fleet, Kind.OPERATOR_CERTIFICATE_ISSUED) == ["operator/operator"]
    await fleet.operator.status()  # over the connection and with the certificate from before
    await fleet.add("site-1")
    async with connect(fleet.folder / "coordinator") as again:
        async with asyncio.timeout(PATIENCE_S):
            while (await again.status()).num_connected < 2:
                await asyncio.sleep(0.01)


# -- the audit log ----------------------------------------------------------------------------


async def test_the_log_tells_the_whole_story(fleet: Fleet, tmp_path: Path) -> None:
    """Who was let in, refused, changed; in order, by whom, signed to the end, without a secret."""
    token = (await fleet.operator.create_token("line-3", 600)).token
    await enrol(token, tmp_path / "press-7", "press-7")
    with pytest.raises(EnrolmentError):
        await enrol(token, tmp_path / "thief", "thief")
    for index in range(3):
        await fleet.add(f"site-{index}", {"step": 1.0})
    await provoke(fleet, tmp_path / "press-7")
    campaign = await fleet.finish(
        await fleet.start_campaign(campaign_plan(cohort=3, expected_dropout=0.0))
    )
    cancelled = await fleet.start_campaign(campaign_plan(num_rounds=100))
    await fleet.operator.cancel(cancelled)
    await fleet.operator.publish_model("add-one", "3", b"a model", group="line-3")
    await fleet.operator.revoke("press-7")
    await fleet.stop_coordinator()

    log = log_of(fleet)
    assert_told(log, campaign, cancelled)
    database = fleet.folder / "coordinator" / "coordinator.db"
    authority = load_certificate(tmp_path / "press-7" / "ca.pem")
    report = audit.verify(read_log(database), authority)
    assert report.signed_until == report.num_entries == len(log)
    secret = EnrolmentToken.parse(token).secret
    text = "".join(audit.to_line(entry) for entry in log)
    assert secret.hex() not in text
    assert token not in text
    await fleet.start_coordinator()


async def provoke(fleet: Fleet, folder: Path) -> None:
    """As a device, call what only operators may, then send an answer to no round."""
    address = fleet.coordinator.addresses.device
    async with transport.open_channel(
        address, load_identity(folder), clock=fleet.certificate_clock
    ) as channel:
        with pytest.raises(AccessError), transport.calling(address):
            await pb_grpc.OperatorServiceStub(channel).GetStatus(pb.GetStatusRequest())
        call = pb_grpc.FederationServiceStub(channel).Session()
        await call.write(pb.SessionRequest(hello=pb.Hello()))
        assert (await call.read()).WhichOneof("body") == "welcome"
        answer = pb.MaskedUpdate(round_id="ab" * 16, digest=bytes(32), size=1)
        await call.write(pb.SessionRequest(masked_update=answer))
        assert (await call.read()).WhichOneof("body") == "refusal"


def assert_told(log: list[Entry], campaign: pb.Campaign, cancelled: str) -> None:
    """Check what `test_the_log_tells_the_whole_story` did, entry by entry."""
    by_kind: dict[str, list[Entry]] = {}
    for entry in log:
        by_kind.setdefault(entry.kind, []).append(entry)
    assert log[0].kind == Kind.COORDINATOR_STARTED
    assert log[-1].kind == Kind.COORDINATOR_STOPPED
    made, redeemed = by_kind[Kind.TOKEN_MADE][0], by_kind[Kind.TOKEN_REDEEMED][0]
    assert made.subject == redeemed.subject
    assert made.details == {
        "by": "operator/operator",
        "group": "line-3",
        "lifetime_s": 600,
        "uses": 1,
    }
    (refused,) = by_kind[Kind.ENROLMENT_REFUSED]
    assert (refused.subject, refused.details["name"]) == ("stranger", "thief")
    assert f"token/{refused.details['token']}" == made.subject
    assert "used already" in refused.details["reason"]
    enrolled = [entry.subject for entry in by_kind[Kind.DEVICE_ENROLLED]]
    assert enrolled == ["device/press-7", "device/site-0", "device/site-1", "device/site-2"]
    assert by_kind[Kind.ACCESS_REFUSED][0].subject == "device/press-7"
    assert "GetStatus" in by_kind[Kind.ACCESS_REFUSED][0].details["method"]
    assert by_kind[Kind.MESSAGE_REFUSED][0].subject == "device/press-7"
    assert by_kind[Kind.MESSAGE_REFUSED][0].details["round"] == "ab" * 16
    assert len(by_kind[Kind.CAMPAIGN_STARTED]) == 2
    (committed,) = by_kind[Kind.ROUND_COMMITTED]
    assert committed.subject == f"round/{campaign.rounds[0].round_id}"
    assert committed.details["num_survivors"] == 3
    assert committed.details["model_digest"] == campaign.model_digest.hex()
    assert by_kind[Kind.CAMPAIGN_ENDED][0].details["state"] == "completed"
    assert by_kind[Kind.CAMPAIGN_CANCELLED][0].subject == f"campaign/{cancelled}"
    assert by_kind[Kind.CAMPAIGN_CANCELLED][0].details == {"by": "operator/operator"}
    assert by_kind[Kind.MODEL_PUBLISHED][0].details["version"] == "3"
    assert by_kind[Kind.DEVICE_REVOKED][0].subject == "device/press-7"


async def test_an_aborted_round_is_told(fleet: Fleet) -> None:
    """With its reason and how many were left."""
    for index in range(4):
        await fleet.add(f"site-{index}", {"fail": "disk full"} if index > 1 else {"step": 1.0})
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan()))
    aborted = [entry for entry in log_of(fleet) if entry.kind == Kind.ROUND_ABORTED]
    assert [entry.subject for entry in aborted] == [f"round/{r.round_id}" for r in campaign.rounds]
    assert all(entry.details["reason"] for entry in aborted)


async def test_the_log_goes_on_after_a_restart(fleet: Fleet) -> None:
    """Starts and stops are told; a start without a stop before it would be a crash."""
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    kinds = [entry.kind for entry in log_of(fleet)]
    assert kinds == [
        Kind.COORDINATOR_STARTED,
        Kind.COORDINATOR_STOPPED,
        Kind.COORDINATOR_STARTED,
    ]
    authority = Authority.open(fleet.folder / "coordinator" / "authority").certificate
    report = audit.verify(read_log(fleet.folder / "coordinator" / "coordinator.db"), authority)
    assert report.signed_until == 3
