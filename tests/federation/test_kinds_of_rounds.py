"""Plain rounds, groups and over-selection over real gRPC with mutual TLS."""

import math
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation.errors import CampaignError
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import Fleet, campaign_plan, toy_model

PLAIN = {"protection": pb.PROTECTION_PLAIN}


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator without devices."""
    async with Fleet(tmp_path) as fleet:
        yield fleet


async def moved(fleet: Fleet, campaign: pb.Campaign) -> float:
    """Say by how much a campaign moved each value of its model; all move alike."""
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    steps = np.concatenate([(result[n] - v).ravel() for n, v in toy_model().items()])
    assert np.ptp(steps) < 1e-3  # some levels of fixed point
    return float(steps.mean())


async def test_plain_mean(fleet: Fleet) -> None:
    """Two plain rounds give the weighted mean twice; weights are capped as in secure ones."""
    for index, (step, num_examples) in enumerate([(1.0, 25), (-3.0, 50), (2.0, 25), (8.0, 999)]):
        options = {"step": step, "num_examples": num_examples}
        await fleet.add(f"site-{index}", options, allow_plain=True)
    plan = campaign_plan(num_rounds=2, **PLAIN)
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert await moved(fleet, campaign) == pytest.approx(2 * (25 - 150 + 50 + 800) / 200)
    for round_ in campaign.rounds:
        assert round_.total_weight == 200
        assert round_.survivors == round_.cohort == [f"site-{index}" for index in range(4)]
        assert not round_.HasField("plan")
        assert round_.plain_plan.num_values == 1007


async def test_owner_decides_over_plain_rounds(fleet: Fleet) -> None:
    """A device whose owner did not allow it sends nothing; the round says why it is not in."""
    for index in range(4):
        allow = index != 2
        await fleet.add(f"site-{index}", {"step": float(index)}, allow_plain=allow)
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan(**PLAIN)))
    assert campaign.rounds[0].survivors == ["site-0", "site-1", "site-3"]
    assert "allow_plain" in campaign.rounds[0].lost["site-2"]
    assert await moved(fleet, campaign) == pytest.approx(4 / 3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
async def test_diverged_training_stays_at_home(fleet: Fleet, poison: float) -> None:
    """A device notices itself that its update is not finite, and withdraws with the reason."""
    for index, step in enumerate([1.0, 1.0, 1.0, poison]):
        await fleet.add(f"site-{index}", {"step": step}, allow_plain=True)
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan(**PLAIN)))
    assert "NaN or infinity" in campaign.rounds[0].lost["site-3"]
    assert await moved(fleet, campaign) == 1.0


async def test_plain_round_survives_a_restart(fleet: Fleet) -> None:
    """Updates that arrived before the coordinator stopped are in the mean, once."""
    for index, delay_s in enumerate([0.0, 0.0, 0.0, 2.0]):
        options = {"step": float(index), "delay_s": delay_s}
        await fleet.add(f"site-{index}", options, allow_plain=True)
    campaign_id = await fleet.start_campaign(campaign_plan(**PLAIN))
    async for campaign in fleet.operator.watch(campaign_id):
        if campaign.rounds and len(campaign.rounds[0].survivors) == 3:
            break
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    campaign = await fleet.finish(campaign_id)
    assert len(campaign.rounds) == 1
    assert len(campaign.rounds[0].survivors) == 4
    assert await moved(fleet, campaign) == pytest.approx(6 / 4)


async def test_sums_within_groups(fleet: Fleet) -> None:
    """A secure round in two groups of three gives the mean over both."""
    for index, step in enumerate([1.0, 1.0, 1.0, -1.0, 1.0, 1.0]):
        options = {"step": step, "num_examples": 100 if index else 50}
        await fleet.add(f"site-{index}", options)
    plan = campaign_plan(cohort=6, min_cohort=6, num_groups=2, expected_dropout=0.0)
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert campaign.rounds[0].plan.max_cohort == 3
    assert campaign.rounds[0].total_weight == 550
    assert await moved(fleet, campaign) == pytest.approx(350 / 550, abs=1e-4)


async def test_slowest_device_is_not_waited_for(fleet: Fleet) -> None:
    """With over-selection a round is done when the cohort's fastest are; the slow one is told."""
    for index, delay_s in enumerate([0.0, 0.0, 0.0, 600.0]):
        await fleet.add(f"site-{index}", {"step": 1.0, "delay_s": delay_s})
    plan = campaign_plan(cohort=3, over_selection=0.33, expected_dropout=0.0)
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert campaign.rounds[0].survivors == ["site-0", "site-1", "site-2"]
    assert "enough others were faster" in campaign.rounds[0].lost["site-3"]
    assert await moved(fleet, campaign) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_groups": 2, **PLAIN}, "groups are for secure rounds"),
        ({"num_groups": 3, "cohort": 9, "min_cohort": 8}, "groups of equal size"),
        ({"num_groups": 2}, "no round can work"),
        ({"over_selection": -0.1}, "over_selection"),
        ({"over_selection": math.nan}, "over_selection"),
        ({"cohort": 4000, "over_selection": 0.1}, "devices would be invited"),
    ],
)
async def test_impossible_campaigns(fleet: Fleet, changes: dict[str, object], reason: str) -> None:
    """What cannot work is refused at the start, in words."""
    plan = campaign_plan(**{"min_cohort": 4, **changes})
    with pytest.raises(CampaignError, match=reason):
        await fleet.start_campaign(plan)
