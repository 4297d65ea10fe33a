"""Rules in campaigns: liars over real gRPC, in plain rounds and in sums of secure groups."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.aggregation.rules import (
    Clip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)
from minga.federation.errors import CampaignError, PeerError
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import Fleet, campaign_plan, toy_model

SHARE = 0.25
ROBUST = [
    Median(),
    TrimmedMean(liar_share=SHARE),
    Krum(liar_share=SHARE),
    MultiKrum(liar_share=SHARE),
    GeometricMedian(),
    Median(clip=Clip(max_norm=500.0)),
]
RULES = [Mean(), Mean(clip=Clip()), Krum(liar_share=0.1, clip=Clip(max_norm=0.5)), *ROBUST]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator without devices."""
    async with Fleet(tmp_path) as fleet:
        yield fleet


async def moved(fleet: Fleet, campaign: pb.Campaign) -> float:
    """Say by how much a campaign moved each value of its model; all move alike."""
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    steps = np.concatenate([(result[n] - v).ravel() for n, v in toy_model().items()])
    assert np.ptp(steps) < 1e-2  # some levels of fixed point
    return float(steps.mean())


async def test_one_liar_among_five(fleet: Fleet) -> None:
    """In plain rounds one device that sends a huge update moves the mean, and no robust rule."""
    for index, step in enumerate([1.0, 1.1, 0.9, 1.0, -800.0]):
        options = {"step": step, "num_examples": 100}
        await fleet.add(f"site-{index}", options, allow_plain=True)
    for rule in [Mean(), *ROBUST]:
        plan = campaign_plan(
            cohort=5,
            min_cohort=5,
            protection=pb.PROTECTION_PLAIN,
            rule=wire.rule_to_wire(rule),
        )
        campaign = await fleet.finish(await fleet.start_campaign(plan))
        assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
        assert campaign.rounds[0].total_weight == 500
        step = await moved(fleet, campaign)
        assert step < -100 if rule == Mean() else 0.9 <= step <= 1.1, rule


async def test_liars_in_one_group_of_three(fleet: Fleet) -> None:
    """Secrecy and robustness together: three sums are seen, and the odd one is outvoted."""
    for index, step in enumerate([1.0] * 8 + [-90.0]):
        await fleet.add(f"site-{index}", {"step": step})
    plan = campaign_plan(
        cohort=9,
        min_cohort=9,
        num_groups=3,
        expected_dropout=0.0,
        clip=100.0,
        value_bits=20,
        rule=wire.rule_to_wire(Median()),
    )
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert await moved(fleet, campaign) == pytest.approx(1.0, abs=1e-2)


async def test_broken_update_of_a_hostile_device(fleet: Fleet) -> None:
    """A device that uploads NaN in spite of its agent is named as lost; the others go on."""
    for index in range(4):
        await fleet.add(f"site-{index}", {"step": 1.0, "delay_s": 0.3}, allow_plain=True)
    plan = campaign_plan(protection=pb.PROTECTION_PLAIN, rule=wire.rule_to_wire(GeometricMedian()))
    with pytest.MonkeyPatch.context() as patch:
        sent: list[int] = []

        def first_is_poisoned(delta: np.ndarray) -> bytes:
            sent.append(1)
            return (delta * np.float32(np.nan if len(sent) == 1 else 1)).tobytes()

        patch.setattr("minga.federation.device.participant.update_to_bytes", first_is_poisoned)
        campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    [round_] = campaign.rounds
    assert list(round_.lost.values()) == ["it holds NaN or infinity"]
    assert len(round_.survivors) == 3
    assert await moved(fleet, campaign) == 1.0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_plan_carries_the_rule(rule: Rule) -> None:
    """What is written into a plan is read from it."""
    plan = campaign_plan(rule=wire.rule_to_wire(rule))
    assert wire.rule_from_wire(pb.CampaignPlan.FromString(plan.SerializeToString())) == rule


def test_plan_without_a_rule_means_the_mean() -> None:
    """Plans of before there were rules say the mean."""
    assert wire.rule_from_wire(campaign_plan()) == Mean()


def test_unknown_rule_is_refused() -> None:
    """A rule of a later version is not taken for the mean."""
    plan = campaign_plan(rule=pb.AggregationRule())
    with pytest.raises(PeerError, match="no rule that this coordinator knows"):
        wire.rule_from_wire(plan)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rule": wire.rule_to_wire(Median())}, "1 sound contributions are too few for Median"),
        (
            {
                "protection": pb.PROTECTION_PLAIN,
                "rule": wire.rule_to_wire(Krum(liar_share=0.2)),
            },
            "3 sound contributions are too few for Krum; it needs 5",
        ),
        (
            {"rule": pb.AggregationRule(trimmed_mean=pb.TrimmedMean(liar_share=0.7))},
            "liar_share is 0.7",
        ),
        ({"rule": pb.AggregationRule(mean=pb.Mean(), max_norm=-1)}, "max_norm is -1"),
        ({"rule": pb.AggregationRule(max_norm=1)}, "upgrade it"),
    ],
)
async def test_rule_that_cannot_work(fleet: Fleet, changes: dict[str, object], reason: str) -> None:
    """A campaign whose rule could never be applied is refused before it starts."""
    with pytest.raises(CampaignError, match=reason):
        await fleet.start_campaign(campaign_plan(**changes))
