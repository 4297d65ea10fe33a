"""Plain rounds, groups and over-selection over real gRPC with mutual TLS."""

import asyncio
import math
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from minga.federation.errors import CampaignError
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, Stream, campaign_plan, toy_model

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


# --- groups of devices, and how soon a round begins ---


TRAINS = pb.Hello(trains=True)


async def open_streams(stack: AsyncExitStack, fleet: Fleet, names: Iterable[str]) -> list[Stream]:
    """Connect enrolled devices that do nothing by themselves."""
    return [await stack.enter_async_context(fleet.stream(name, TRAINS)) for name in names]


async def test_a_campaign_invites_its_group_alone(fleet: Fleet) -> None:
    """Of two groups' devices, all connected, only those whose token was the group's are asked."""
    ours, others = (["near-0", "near-1", "near-2"], ["far-0", "far-1", "far-2"])
    async with AsyncExitStack() as stack:
        for name in ours + others:
            await fleet.enrol(name, "near" if name in ours else "far")
        near = await open_streams(stack, fleet, ours)
        far = await open_streams(stack, fleet, others)
        plan = campaign_plan(
            group="near", cohort=6, min_cohort=3, expected_dropout=0.0, invite_timeout_s=0.1
        )
        campaign_id = await fleet.start_campaign(plan)
        for stream in near:
            assert (await stream.read()).WhichOneof("body") == "invite"
        campaign = await fleet.reach(campaign_id, pb.ROUND_STAGE_KEYS)
        assert list(campaign.rounds[0].invited) == ours
        for stream in far:
            await stream.write(pb.SessionRequest(heartbeat=pb.Heartbeat()))
            assert (await stream.read()).WhichOneof("body") == "heartbeat"  # and nothing before


async def test_a_round_of_idle_devices_begins_at_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From StartCampaign to an invitation at every idle device it takes no timer, and milliseconds.

    The event loop's clock stands still meanwhile: whatever waits for a time to pass, were it a
    millisecond, waits for ever. Real time is measured beside it.
    """
    names, loop = [f"site-{index}" for index in range(8)], asyncio.get_running_loop()
    plan = campaign_plan(cohort=len(names), min_cohort=len(names))
    took: list[float] = []
    async with AsyncExitStack() as stack:
        for name in names:
            await fleet.enrol(name)
        streams = await open_streams(stack, fleet, names)

        async def end(campaign_id: str) -> None:
            await fleet.operator.cancel(campaign_id)
            await fleet.finish(campaign_id)
            for stream in streams:
                assert (await stream.read()).WhichOneof("body") == "round_end"

        first = await fleet.start_campaign(plan)  # the model is at the coordinator from now on
        for stream in streams:
            assert (await stream.read()).WhichOneof("body") == "invite"
        await end(first)
        for _ in range(5):
            with monkeypatch.context() as patch:
                patch.setattr(loop, "time", partial(float, loop.time()))
                began = time.perf_counter()
                campaign_id = await fleet.operator.start_query(plan)  # that is StartCampaign alone
                reads = [asyncio.ensure_future(stream.read()) for stream in streams]
                while not all(read.done() for read in reads):
                    assert time.perf_counter() < began + PATIENCE_S, "a timer is waited for"
                    await asyncio.to_thread(time.sleep, 0.001)
                took.append(time.perf_counter() - began)
            assert {read.result().WhichOneof("body") for read in reads} == {"invite"}
            await end(campaign_id)
    assert statistics.median(took) < 0.25, took
