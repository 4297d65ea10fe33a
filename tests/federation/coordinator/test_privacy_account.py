"""The privacy ledger in the coordinator's database: each round spends once, whatever happens."""

import asyncio
from pathlib import Path

import pytest

from minga.federation.aggregation.ledger import Gaussian, Ledger, Spent
from minga.federation.coordinator.privacy_account import PrivacyAccount
from minga.federation.coordinator.store import DATABASE_FILE, Store
from minga.federation.errors import PrivacyError, StorageError
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model

PRIVACY = pb.Privacy(
    epsilon=100.0,
    delta=1e-5,
    noise_multiplier=0.2,
    max_norm=1.0,
    quantile=0.5,
    quantile_rate=1.0,
)
TWICE = Ledger((Spent(mechanism=Gaussian(noise_multiplier=0.2)),) * 2)
NUM_WRITES = 80
"""More than a campaign of two rounds takes."""


def begin(folder: Path) -> tuple[Desk, str]:
    """Start a private campaign of two rounds with three devices, and stop the coordinator."""
    desk = Desk(folder)
    for name in ("site-0", "site-1", "site-2"):
        desk.enrol(name, 0.01)
    desk.start()
    plan = campaign_plan(num_rounds=2, cohort=3, expected_dropout=0.0, privacy=PRIVACY)
    return desk, desk.start_campaign(plan, toy_model())


@pytest.mark.slow
async def test_killed_before_any_write_spends_once(tmp_path: Path) -> None:
    """However often a sum is made again, each round has one entry and moves the bound once."""
    ended_by_itself = False
    for lives in range(1, NUM_WRITES, 3):
        desk, campaign_id = begin(tmp_path / str(lives))
        await desk.stop()
        desk.start(lives)
        desk.connect()
        killed = asyncio.create_task(desk.lives.killed.wait())
        ended = asyncio.create_task(desk.finish(campaign_id))
        await asyncio.wait([killed, ended], return_when=asyncio.FIRST_COMPLETED)
        ended_by_itself = not killed.done()
        for task in (killed, ended):
            task.cancel()
        await desk.stop()

        desk.start()
        desk.connect()
        campaign = await desk.finish(campaign_id)
        await desk.stop()
        assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, (lives, campaign.reason)
        store = Store(desk.folder / DATABASE_FILE)
        committed = {round_.round_id for round_ in campaign.rounds}
        assert store.privacy_spent().keys() == committed, lives
        assert PrivacyAccount(store).ledger() == TWICE
        store.close()
        epsilon = TWICE.epsilon(PRIVACY.delta)
        assert campaign.rounds[-1].privacy.epsilon == pytest.approx(epsilon)
        # All updates are within the bound, 1 and then what the first round left of it.
        left = [round_.privacy.max_norm for round_ in campaign.rounds]
        assert [round_.plan.clip for round_ in campaign.rounds] == [1.0, left[0]], lives
        assert all(0.6 < ratio < 0.85 for ratio in (left[0], left[1] / left[0])), left
        if ended_by_itself:
            return
    raise AssertionError("NUM_WRITES is too small to reach the campaign's last write")


async def test_sum_is_not_made_while_its_spending_cannot_be_stored(tmp_path: Path) -> None:
    """A full disk stops the campaign before the sum is made; later it goes on and spends once."""
    desk, campaign_id = begin(tmp_path)
    desk.fail_to("INSERT ON privacy_spent")
    desk.connect()
    await desk.reach(campaign_id, pb.ROUND_STAGE_AGGREGATE)
    for _ in range(20):
        await asyncio.sleep(0)
    assert desk.store.privacy_spent() == {}
    assert desk.campaigns.get(campaign_id).num_committed == 0
    desk.recover()
    campaign = await desk.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert PrivacyAccount(desk.store).ledger() == TWICE
    await desk.stop()


async def test_round_beyond_the_budget_is_not_begun(tmp_path: Path) -> None:
    """A campaign ends before the round that would overspend; what it committed stays."""
    desk, campaign_id = begin(tmp_path)
    desk.hold_training()
    desk.connect()
    await desk.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    # Another campaign's spending, so large that one of the two rounds still fits.
    other = Spent(mechanism=Gaussian(noise_multiplier=0.1))
    desk.store.spend_privacy("ff" * 16, Ledger((other,)).to_json())
    one, two = (Ledger((other, *TWICE.entries[:num])).epsilon(PRIVACY.delta) for num in (1, 2))
    desk.campaigns.get(campaign_id).plan.privacy.epsilon = (one + two) / 2
    desk.release_training()
    campaign = await desk.finish(campaign_id)
    await desk.stop()
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    assert "1 more round would bring" in campaign.reason
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_COMMITTED]
    assert campaign.rounds[0].privacy.epsilon == pytest.approx(one)


def test_damaged_ledger_spends_nothing(tmp_path: Path) -> None:
    """A ledger that cannot be read is not taken for an empty one."""
    store = Store(tmp_path / DATABASE_FILE)
    store.spend_privacy("00" * 16, "[[]]")
    plan = campaign_plan(privacy=PRIVACY)
    with pytest.raises(PrivacyError, match="the privacy ledger cannot be read"):
        PrivacyAccount(store).require_left(plan)
    with pytest.raises(StorageError):
        store.spend_privacy("00" * 16, "[]")
    store.close()
