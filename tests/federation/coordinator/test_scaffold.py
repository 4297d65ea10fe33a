"""SCAFFOLD over rounds: control variates that travel, and those that stay."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation.errors import CampaignError
from minga.federation.parameters import Parameters, from_bytes
from minga.federation.parts import split_control
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Desk
from tests.federation.coordinator.hills import NAME, OPTIMUM, SITES, Scaffold, SiteTrainer
from tests.federation.fleet import campaign_plan

START = {NAME: np.array([4.0, 4.0], np.float32)}
NUM_ROUNDS = 10
TOLERANCE = 2e-3
"""Rounding to 24 bits, with a clip of 64, adds up to less than that over the rounds."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and four sites, connected."""
    desk = Desk(tmp_path)
    desk.grace_s = 0.3
    for index, site in enumerate(SITES):
        desk.hire(f"site-{index}", SiteTrainer(site))
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


def plan_of(**changes: object) -> pb.CampaignPlan:
    numbers = {"num_rounds": NUM_ROUNDS, "scaffold": True, "clip": 64.0, "value_bits": 24}
    return campaign_plan(**{**numbers, **changes})


def result_of(desk: Desk, campaign: pb.Campaign) -> tuple[Parameters, Parameters]:
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    return split_control(from_bytes(desk.blobs.read(campaign.model_digest)))


async def own_controls(desk: Desk, campaign: pb.Campaign) -> list[np.ndarray]:
    """Give the devices' own variates, when all have heard how the last round ended."""
    last = campaign.rounds[-1]
    for name in last.survivors:
        await desk.devices[name].end_of(last.round_id)
    return [d.keepsakes.control(campaign.campaign_id)[NAME] for d in desk.devices.values()]


@pytest.mark.parametrize(
    "how",
    [
        {"protection": pb.PROTECTION_SECURE},
        {"protection": pb.PROTECTION_SECURE, "rotate": True},
        {"protection": pb.PROTECTION_PLAIN},
    ],
    ids=["secure", "rotated", "plain"],
)
async def test_rounds_are_the_algorithm(desk: Desk, how: dict[str, object]) -> None:
    """Three of four sites a round, drawn at random, lead where the algorithm leads: the optimum."""
    plan = plan_of(num_rounds=5, cohort=3, expected_dropout=0.0, **how)
    campaign = await desk.finish(desk.start_campaign(plan, START))
    model, control = result_of(desk, campaign)
    reference = Scaffold(START[NAME].astype(np.float64))
    for round_ in campaign.rounds:
        assert round_.total_weight == len(round_.survivors) == 3
        reference.round([int(name[-1]) for name in round_.survivors])
    np.testing.assert_allclose(model[NAME], reference.model, atol=TOLERANCE)
    np.testing.assert_allclose(control[NAME], reference.control, atol=TOLERANCE)
    for own, expected in zip(await own_controls(desk, campaign), reference.controls, strict=True):
        np.testing.assert_allclose(own, expected, atol=TOLERANCE)


async def test_variates_are_means_over_the_group(tmp_path: Path) -> None:
    """Devices of other groups are neither asked nor counted among those that the mean is over."""
    desk = Desk(tmp_path)
    for index, site in enumerate(SITES):
        desk.hire(f"site-{index}", SiteTrainer(site), group="hills")
        desk.hire(f"other-{index}", SiteTrainer(site), group="plains")
    desk.start()
    desk.connect()
    plan = plan_of(num_rounds=3, cohort=3, expected_dropout=0.0, group="hills")
    campaign = await desk.finish(desk.start_campaign(plan, START))
    model, control = result_of(desk, campaign)
    reference = Scaffold(START[NAME].astype(np.float64))
    for round_ in campaign.rounds:
        reference.round([int(name.removeprefix("site-")) for name in round_.invited])
    np.testing.assert_allclose(model[NAME], reference.model, atol=TOLERANCE)
    np.testing.assert_allclose(control[NAME], reference.control, atol=TOLERANCE)
    await desk.stop()


async def test_only_scaffold_finds_the_optimum(desk: Desk) -> None:
    """With ten local steps at unlike sites averaging ends elsewhere; SCAFFOLD does not."""
    plain = pb.PROTECTION_PLAIN
    plan = plan_of(scaffold=False, protection=plain)
    averaged = await desk.finish(desk.start_campaign(plan, START))
    model, control = result_of(desk, averaged)
    assert not control
    assert np.abs(model[NAME] - OPTIMUM).max() > 0.5
    corrected = await desk.finish(desk.start_campaign(plan_of(protection=plain), START))
    model, _ = result_of(desk, corrected)
    np.testing.assert_allclose(model[NAME], OPTIMUM, atol=0.02)


@pytest.mark.parametrize("step", ["neighbour_keys", "survivors"])
async def test_own_variate_settles_if_it_counted(desk: Desk, step: str) -> None:
    """Killed before or after its update was in, a device keeps the variate that the sum has."""
    device = desk.devices["site-0"]
    device.dies_at, device.dies_with_pending = step, True
    campaign_id = desk.start_campaign(plan_of(num_rounds=1), START)
    await desk.until_connected(3)
    campaign = await desk.finish(campaign_id)
    assert not device.keepsakes.control(campaign_id)
    counted = "site-0" in campaign.rounds[0].survivors
    assert counted == (step == "survivors")
    assert device.keepsakes.pending == campaign.rounds[0].round_id  # nobody told it yet
    desk.connect("site-0")
    for other in desk.devices.values():
        await other.end_of(campaign.rounds[0].round_id)
    owns = [d.keepsakes.control(campaign_id) for d in desk.devices.values()]
    assert bool(owns[0]) == counted
    assert not any(device.keepsakes.pending for device in desk.devices.values())
    _, control = result_of(desk, campaign)
    mean = np.sum([own[NAME] for own in owns if own], axis=0) / len(SITES)
    np.testing.assert_allclose(control[NAME], mean, atol=TOLERANCE)


async def test_next_campaign_starts_at_zero(desk: Desk) -> None:
    """A variate is its campaign's: the next one forgets it."""
    first = desk.start_campaign(plan_of(num_rounds=1), START)
    await desk.finish(first)
    second = await desk.finish(desk.start_campaign(plan_of(num_rounds=1), START))
    reference = Scaffold(START[NAME].astype(np.float64))
    reference.round(range(len(SITES)))
    for own, expected in zip(await own_controls(desk, second), reference.controls, strict=True):
        np.testing.assert_allclose(own, expected, atol=TOLERANCE)
    assert not desk.devices["site-0"].keepsakes.control(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": pb.AggregationRule(median=pb.Median())}, "scaffold takes the mean"),
        (
            {"privacy": pb.Privacy(noise_multiplier=1.0, max_norm=1.0, delta=1e-5, epsilon=9.0)},
            "without noise",
        ),
    ],
)
async def test_what_control_variates_do_not_bear(
    desk: Desk, changes: dict[str, object], message: str
) -> None:
    """Rules and noise of which a mean over devices would know nothing are refused."""
    plan = plan_of(protection=pb.PROTECTION_PLAIN, **changes)
    with pytest.raises(CampaignError, match=message):
        desk.start_campaign(plan, START)


async def test_names_that_would_be_mistaken(desk: Desk) -> None:
    """A model with tensors named as control variates starts no campaign."""
    with pytest.raises(CampaignError, match="named as a control variate"):
        desk.start_campaign(plan_of(), {"control/x": np.zeros(2, np.float32)})
