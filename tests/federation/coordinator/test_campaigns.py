"""Campaigns over crashes, full disks, cancellation, and errors that nobody foresaw."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation import audit, wire
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.hub import Connection
from minga.federation.coordinator.store import Store
from minga.federation.errors import CampaignError, StorageError
from minga.federation.limits import MAX_MESSAGE_BYTES, RETURN_S
from minga.federation.parameters import to_bytes
from minga.federation.secagg.errors import PlanError
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Clock, Desk, ForgetfulStore
from tests.federation.fleet import campaign_plan, toy_model

NUM_WRITES = 30
"""A campaign of one round with three devices makes fewer writes than this."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and three devices, connected."""
    desk = Desk(tmp_path)
    enrol_three(desk)
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


MEAN = 1 / 3


def enrol_three(desk: Desk) -> None:
    """Add three devices whose updates fixed point holds exactly, and their mean with them."""
    for index, step in enumerate((1.0, 1.0, -1.0)):
        desk.enrol(f"site-{index}", step)


def plan_of(**changes: object) -> pb.CampaignPlan:
    return campaign_plan(**{"cohort": 3, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("store", [Store, ForgetfulStore], ids=["killed", "without power"])
async def test_killed_before_any_write(tmp_path: Path, store: type[Store]) -> None:
    """Killed between any two writes, the coordinator goes on: each update counts exactly once."""
    for lives in range(1, NUM_WRITES):
        desk = Desk(tmp_path / str(lives))
        desk.make_store = store
        enrol_three(desk)
        desk.start()
        campaign, was_killed = await desk.finish_over_a_kill(plan_of(), toy_model(), lives)
        await assert_exact(desk, campaign)
        assert_told_once(desk, campaign)
        await desk.stop()
    assert not was_killed, "NUM_WRITES is too small to reach the campaign's last write"


async def test_nobody_is_told_what_the_disk_may_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What instructions follow from is safe from a loss of power before they are sent."""
    desk = Desk(tmp_path)
    desk.make_store = ForgetfulStore
    enrol_three(desk)
    desk.start()
    afloat, send = [], Connection.send

    def seen(connection: Connection, message: pb.SessionResponse) -> bool:
        assert isinstance(desk.store, ForgetfulStore)
        afloat.append(len(desk.store.afloat))
        return send(connection, message)

    monkeypatch.setattr(Connection, "send", seen)
    desk.connect()
    campaign = await desk.finish(desk.start_campaign(plan_of(), toy_model()))
    await assert_exact(desk, campaign)
    await desk.stop()
    assert len(afloat) > 3 * 5
    assert not any(afloat)


def assert_told_once(desk: Desk, campaign: pb.Campaign) -> None:
    """Check that the audit log is whole and tells each end once, however often it was begun."""
    records = list(read_log(desk.folder / "coordinator.db"))
    audit.verify(records, desk.authority.certificate)
    ends = [(entry.kind, entry.subject) for entry in records if isinstance(entry, audit.Entry)]
    assert sorted(ends) == sorted(
        [
            (Kind.CAMPAIGN_STARTED, f"campaign/{campaign.campaign_id}"),
            (Kind.CAMPAIGN_ENDED, f"campaign/{campaign.campaign_id}"),
            *((Kind.ROUND_COMMITTED, f"round/{round_.round_id}") for round_ in campaign.rounds),
        ]
    )


@pytest.mark.parametrize(
    "write", ["INSERT ON rounds", "UPDATE OF model_digest ON campaigns", "DELETE ON round_events"]
)
async def test_full_disk_halts_a_campaign(
    desk: Desk, write: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be stored has not happened, and is told; with space again the round goes on."""
    model = toy_model()
    desk.fail_to(write)
    campaign_id = desk.start_campaign(plan_of(), model)
    async with asyncio.timeout(10):
        async for campaign in desk.campaigns.watch(campaign_id):
            if "disk is full" in campaign.reason:
                break
    assert "stands still" in caplog.text
    assert campaign.state == pb.CAMPAIGN_STATE_RUNNING
    desk.recover()
    await assert_exact(desk, await desk.finish(campaign_id))


async def test_full_disk_takes_no_answer(desk: Desk) -> None:
    """A device whose answer met a full disk is asked again; nothing of it was remembered."""
    desk.fail_to("INSERT ON round_events")
    campaign_id = desk.start_campaign(plan_of(), toy_model())
    await desk.until_connected(0)
    (round_,) = desk.campaigns.get(campaign_id).describe().rounds
    assert list(round_.cohort) == []
    desk.recover()
    desk.connect()
    await assert_exact(desk, await desk.finish(campaign_id))


async def test_full_disk_refuses_operators(desk: Desk) -> None:
    """An operator's wish that cannot be stored is refused with the remedy, and is not done."""
    desk.fail_to("INSERT ON campaigns")
    with pytest.raises(StorageError, match="free space"):
        desk.start_campaign(plan_of(), toy_model())
    desk.recover()
    campaign_id = desk.start_campaign(plan_of(cohort=4), toy_model())
    desk.fail_to("UPDATE ON campaigns")
    with pytest.raises(StorageError, match="free space"):
        desk.campaigns.cancel(campaign_id, "operator/operator")
    assert desk.campaigns.get(campaign_id).is_running


async def assert_exact(desk: Desk, campaign: pb.Campaign) -> None:
    """A campaign of one round ended with the exact mean of all three, each counted once."""
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_COMMITTED]
    assert campaign.rounds[0].total_weight == 300
    for values in desk.moved(campaign, toy_model()).values():
        np.testing.assert_allclose(values, MEAN, atol=1e-6)
    assert [row.rounds_counted for row in desk.store.devices()] == [1, 1, 1]
    for device in desk.devices.values():
        assert (await device.end_of(campaign.rounds[0].round_id)).counted
        assert device.participant is None


async def test_cancelled_while_the_sum_is_made(desk: Desk) -> None:
    """A campaign cancelled during aggregation stays as it was: the sum is thrown away."""
    model = toy_model(400_000)
    campaign_id = desk.start_campaign(plan_of(), model)
    before = desk.campaigns.get(campaign_id).model_digest
    await desk.reach(campaign_id, pb.ROUND_STAGE_AGGREGATE)
    desk.campaigns.cancel(campaign_id, "operator/operator")
    campaign = await desk.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_CANCELLED
    assert campaign.model_digest == before
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_ABORTED]
    assert [row.rounds_counted for row in desk.store.devices()] == [0, 0, 0]


async def test_sum_that_is_not_finite(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A model that overflows fails its campaign with the reason; the next campaign runs."""
    model = toy_model()
    campaign_id = desk.start_campaign(plan_of(server_learning_rate=1e40), model)
    campaign = await desk.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    assert "NaN or infinity" in campaign.reason
    assert "Traceback" in caplog.text
    following = await desk.finish(desk.start_campaign(plan_of(), model))
    assert following.state == pb.CAMPAIGN_STATE_COMPLETED


# --- clocks ---


async def test_stage_starts_again_after_a_restart(tmp_path: Path) -> None:
    """Time in which there was no coordinator counts for no deadline, nor for devices' absence."""
    clock = Clock()
    desk = Desk(tmp_path, clock)
    enrol_three(desk)
    desk.start()
    desk.connect()
    desk.hold_training()
    campaign_id = desk.start_campaign(plan_of(training_timeout_s=30.0), toy_model())
    await desk.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    await desk.stop()
    clock.now += 3600.0
    desk.start()
    desk.connect("site-0")
    await settle()
    clock.now += RETURN_S
    desk.connect("site-1", "site-2")
    await settle()
    desk.release_training()
    await assert_exact(desk, await desk.finish(campaign_id))
    await desk.stop()


async def test_clock_that_is_set_back(tmp_path: Path) -> None:
    """The order of rounds is that of events: a clock set back between them hides none."""
    clock = Clock()
    desk = Desk(tmp_path, clock)
    enrol_three(desk)
    desk.start()
    desk.connect()
    campaign_id = desk.start_campaign(plan_of(num_rounds=2), toy_model())
    async for campaign in desk.campaigns.watch(campaign_id):
        if campaign.rounds:
            clock.now = 1_600_000_000.0
            break
    await reach_round(desk, campaign_id, 2)
    await desk.stop()
    desk.start()
    desk.connect()
    campaign = await desk.finish(campaign_id)
    assert [round_.number for round_ in campaign.rounds] == [1, 2]
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_COMMITTED] * 2
    await desk.stop()


async def reach_round(desk: Desk, campaign_id: str, number: int) -> None:
    """Wait until a round has begun."""
    async with asyncio.timeout(10):
        async for campaign in desk.campaigns.watch(campaign_id):
            if campaign.rounds and campaign.rounds[-1].number == number:
                return


async def settle() -> None:
    """Let everything run that can run now."""
    for _ in range(100):
        await asyncio.sleep(0)


# --- what stays ---


async def test_nothing_of_past_rounds_stays(desk: Desk) -> None:
    """Of rounds that are over stay their records: no events, no updates, no models in between."""
    campaign_id = desk.start_campaign(plan_of(num_rounds=3), toy_model())
    campaign = await desk.finish(campaign_id)
    blobs = {bytes.fromhex(path.name) for path in (desk.folder / "blobs").glob("?" * 64)}
    assert blobs == {campaign.plan.model_digest, campaign.model_digest}
    (count,) = desk.store.connection.execute("SELECT count(*) FROM round_events").fetchone()
    assert count == 0
    await desk.stop()
    desk.start()
    (again,) = desk.campaigns.describe()
    assert again == campaign


async def test_one_upload_per_device(desk: Desk) -> None:
    """A device may send one update in a round, and none that is not awaited of it."""
    desk.hold_training()
    campaign_id = desk.start_campaign(plan_of(), toy_model())
    expects = desk.campaigns.expects_upload
    await desk.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    round_ = desk.campaigns.get(campaign_id).open_round
    assert round_ is not None
    size = round_.order.plan.upload_size
    assert not expects("site-0", bytes(32), size + 1)
    assert not expects("stranger", bytes(32), size)
    assert expects("site-0", bytes(32), size)
    assert not expects("site-0", b"\x01" * 32, size)
    assert expects("site-0", bytes(32), size)
    assert expects("site-1", b"\x01" * 32, size)


async def test_long_campaigns_fit_into_a_message() -> None:
    """However many rounds of however many devices a campaign has, it can be told."""
    names = [f"a-device-with-quite-a-long-name-number-{index}" for index in range(1000)]
    campaign = Campaign(campaign_id="long", plan=plan_of(), model_digest=bytes(32))
    for number in range(1, 1001):
        campaign.add_record(
            pb.Round(number=number, stage=pb.ROUND_STAGE_COMMITTED, invited=names, survivors=names)
        )
    told = campaign.describe()
    assert told.ByteSize() < MAX_MESSAGE_BYTES
    assert [round_.number for round_ in told.rounds] == list(range(1, 1001))
    assert list(told.rounds[-1].survivors) == names
    assert campaign.num_committed == 1000


# --- plans ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 5000, "min_cohort": 3}, "4096"),
        ({"min_cohort": 0}, "0 devices"),
        ({"min_cohort": 4}, "min_cohort 4"),
        ({"stage_timeout_s": float("inf")}, "stage_timeout_s"),
        ({"server_learning_rate": float("nan")}, "server_learning_rate"),
        ({"expected_dropout": 0.7}, "3 devices"),
        ({"model_digest": bytes(32)}, "no model"),
        ({"model_digest": b"short"}, "32 bytes"),
        ({"training": {"lr": pb.Value()}}, "'lr'"),
    ],
)
async def test_impossible_plans(desk: Desk, changes: dict[str, object], message: str) -> None:
    """A plan that no round could follow is refused when it is made, with the reason."""
    digest = desk.blobs.put_bytes(to_bytes(toy_model()))
    with pytest.raises(CampaignError, match=message):
        desk.campaigns.start(plan_of(**{"model_digest": digest, **changes}), "operator/operator")


async def test_cohort_that_no_plan_exists_for(tmp_path: Path) -> None:
    """Where as many devices came as cannot bear the losses expected, one is left out."""
    desk = Desk(tmp_path)
    for index in range(5):
        desk.enrol(f"site-{index}", 1.0)
    desk.start()
    desk.connect()
    plan = plan_of(cohort=6, min_cohort=4, expected_dropout=0.4, invite_timeout_s=1.0)
    with pytest.raises(PlanError):
        derive_plan_for(plan, 5)
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert len(campaign.rounds[0].invited) == 4
    await desk.stop()


def derive_plan_for(plan: pb.CampaignPlan, cohort: int) -> None:
    wire.round_plan(
        plan,
        round_id="00" * 16,
        model_digest=bytes(32),
        training={},
        num_values=10,
        num_invited=cohort,
    )
