"""What a coordinator process that was killed still knows. Every stage: `test_chaos.py`."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from minga.federation.v1 import federation_pb2 as pb
from tests.federation.exact import WEIGHTS, assert_exact, exact_options, exact_plan
from tests.federation.fleet import toy_model
from tests.federation.process_fleet import ProcessFleet

pytestmark = pytest.mark.slow

MODEL = toy_model(100_000)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[ProcessFleet]:
    """A coordinator process and five devices whose training takes a moment."""
    async with ProcessFleet(tmp_path) as fleet:
        for name in WEIGHTS:
            await fleet.add(name, exact_options(name, delay_s=0.3))
        yield fleet


async def test_device_lost_while_there_is_no_coordinator(fleet: ProcessFleet) -> None:
    """A device that vanishes together with the coordinator is unmasked by the others."""
    campaign_id = await fleet.start_campaign(exact_plan(training_timeout_s=8.0), MODEL)
    await fleet.kill_in(campaign_id, 1, pb.ROUND_STAGE_UPDATES)
    await fleet.stop_device("site-4")
    await fleet.start_coordinator()
    campaign = await fleet.finish(campaign_id)
    assert "site-4" not in campaign.rounds[0].survivors
    await assert_exact(fleet, campaign, MODEL)


async def test_cancelled_campaign_stays_cancelled(fleet: ProcessFleet) -> None:
    """A campaign that was cancelled right before the coordinator was killed stays so."""
    campaign_id = await fleet.start_campaign(exact_plan(), MODEL)
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    await fleet.operator.cancel(campaign_id)
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    campaign = await fleet.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_CANCELLED
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_ABORTED]
    following = await fleet.finish(await fleet.start_campaign(exact_plan(), MODEL))
    await assert_exact(fleet, following, MODEL)
