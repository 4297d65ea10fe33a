"""Rounds whose updates are rotated, over real gRPC."""

from pathlib import Path

import numpy as np

from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import Fleet, campaign_plan, toy_model

CLIP = 8.0  # a constant has coordinates of its own size after the rotation, some a few times it
PLAN = {"rotate": True, "value_bits": 20, "clip": CLIP, "num_rounds": 2}


async def test_rotated_rounds_give_the_mean(tmp_path: Path) -> None:
    """Through a restart of the coordinator in the middle: the mean, within the bound."""
    steps = [0.5, -0.25, 1.0, 0.125]
    async with Fleet(tmp_path) as fleet:
        for index, step in enumerate(steps):
            options = {"step": step, "num_examples": 100, "delay_s": 0.5}
            await fleet.add(f"site-{index}", options)
        campaign_id = await fleet.start_campaign(campaign_plan(**PLAN))
        await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
        campaign = await fleet.finish(campaign_id)
        model = from_bytes(await fleet.operator.read(campaign.model_digest))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert [round_.plan.rotate for round_ in campaign.rounds] == [True, True]
    # Blocks have 64 coordinates: the strict bound of a round is 8 times a level of each device.
    mean, level = 2 * sum(steps) / 4, CLIP / (2**19 - 1)
    for name, value in toy_model().items():
        np.testing.assert_allclose(model[name] - value, mean, atol=2 * 8 * level)
