"""Rounds over the graph that follows from the cohort, and what is written down of it."""

import math
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation.aggregation.privacy import num_noisy
from minga.federation.secagg.sizing import COMPLETE_UP_TO, choose_neighbourhood
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import MAX_VALUE_BITS
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model

NUM_DEVICES = 40
LEVEL = 2.0**-15
MAX_LEVEL = 2**15 - 1  # of 16 bits
MAX_WEIGHT = 16
WEIGHTS = {f"site-{index:02}": 1 + index % MAX_WEIGHT for index in range(NUM_DEVICES)}
UNITS = {name: 37 * index % 401 - 200 for index, name in enumerate(WEIGHTS)}
"""Device -> its update, in levels for each example; weighing keeps them whole."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and forty devices, connected."""
    desk = Desk(tmp_path)
    desk.grace_s = 0.2
    for name, weight in WEIGHTS.items():
        desk.enrol(name, UNITS[name] * MAX_WEIGHT * LEVEL, weight)
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


def plan_of(num_devices: int, **changes: object) -> pb.CampaignPlan:
    numbers = {"cohort": num_devices, "min_cohort": 3, "max_weight": MAX_WEIGHT}
    return campaign_plan(**{**numbers, "clip": MAX_LEVEL * LEVEL, **changes})


def mean_of(names: list[str]) -> np.float32:
    """Compute the mean over some devices, with the coordinator's own rounding."""
    levels = sum(WEIGHTS[name] * UNITS[name] for name in names)
    return np.float32(levels * (LEVEL * MAX_WEIGHT / sum(WEIGHTS[name] for name in names)))


async def test_sparse_round_with_losses(desk: Desk) -> None:
    """Forty devices mask with twelve others each; four vanish, at four stages: the sum is exact."""
    lost = {"site-00": "neighbour_keys", "site-13": "neighbour_shares"}
    silent = {"site-26": "survivors", "site-39": "confirmations"}
    for name, step in (lost | silent).items():
        desk.devices[name].dies_at = step
    plan = plan_of(NUM_DEVICES, min_cohort=30, expected_dropout=0.1, colluder_share=0.05)
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    (round_,) = campaign.rounds
    derived = choose_neighbourhood(NUM_DEVICES, 0.1, 0.05)
    assert NUM_DEVICES > COMPLETE_UP_TO
    assert derived.num_neighbours == round_.plan.num_neighbours == 12
    assert derived.threshold == round_.plan.threshold == 8
    assert round_.lost.keys() >= lost.keys()
    counted = [name for name in WEIGHTS if name not in lost]
    assert list(round_.survivors) == counted
    assert round_.total_weight == sum(WEIGHTS[name] for name in counted)
    for name, moved in desk.moved(campaign, toy_model()).items():
        start = toy_model()[name].astype(np.float64)
        expected = (start + np.float64(mean_of(counted))).astype(np.float32) - toy_model()[name]
        np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize(
    ("cohort", "share", "lost"), [(10, 1 - 0.8, 2), (40, 1 - 0.9, 4), (100, 0.29, 29)]
)
def test_a_share_is_the_one_that_is_meant(cohort: int, share: float, lost: int) -> None:
    """Losses by a share that is a hair too small are borne, and lacking in noise, to the last."""
    assert math.floor(share * cohort) == lost - 1
    meant = choose_neighbourhood(cohort, (lost + 0.5) / cohort, 0.0)
    assert choose_neighbourhood(cohort, share, 0.0) == meant
    assert num_noisy(cohort, share, 0.0) == cohort - lost


@pytest.mark.parametrize(
    ("changes", "in_one_sum", "expected_dropout"),
    [
        ({"expected_dropout": 0.2, "colluder_share": 0.2}, 6, 0.2),
        # One of six is invited for nothing: it counts as a loss beside the others.
        ({"expected_dropout": 0.2, "cohort": 5, "over_selection": 0.2}, 6, 1 - 0.8 * 5 / 6),
        ({"expected_dropout": 0.25, "num_groups": 2, "cohort": 8, "min_cohort": 8}, 4, 0.25),
    ],
    ids=["one sum", "over-selected", "two groups"],
)
async def test_a_round_records_its_derived_numbers(
    desk: Desk, changes: dict[str, object], in_one_sum: int, expected_dropout: float
) -> None:
    """Neighbours, threshold and bits of a finished round are those that its cohort calls for."""
    evaluation = pb.Evaluation(metrics=["step"], clip=1.0)
    plan = plan_of(6, **{"value_bits": 18, "evaluation": evaluation, **changes})
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_COMMITTED] * 2
    derived = choose_neighbourhood(in_one_sum, expected_dropout, plan.colluder_share)
    for round_ in campaign.rounds:
        assert len(round_.invited) == in_one_sum * max(1, plan.num_groups)
        assert round_.plan.max_cohort == in_one_sum
        assert round_.plan.num_neighbours == derived.num_neighbours
        assert round_.plan.threshold == derived.threshold
    training, measuring = campaign.rounds
    assert training.plan.value_bits == plan.value_bits
    room = 32 - math.ceil(math.log2(in_one_sum))
    assert measuring.plan.value_bits == min(MAX_VALUE_BITS, room)
