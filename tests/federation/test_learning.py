"""Devices that keep something for themselves, over real gRPC."""

import asyncio
from pathlib import Path

import numpy as np

from minga.federation.device.keepsakes import Keepsakes
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan, toy_model

HEAD = {"head": np.ones(3, np.float32)}


async def test_device_asks_how_its_round_ended(tmp_path: Path) -> None:
    """A device that was away at the end keeps what counted, and drops what nobody knows of."""
    async with Fleet(tmp_path) as fleet:
        for index in range(4):
            await fleet.add(f"site-{index}", {"step": 0.5})
        campaign = await fleet.finish(await fleet.start_campaign(campaign_plan()))
        round_id = campaign.rounds[0].round_id
        for pending, is_kept in ((round_id, True), ("ab" * 16, False)):
            await fleet.stop_device("site-0")
            kept = Keepsakes(fleet.folder / "site-0" / "learning")
            kept.stage(
                pending, model_name=f"m{pending[:4]}", personal=HEAD, campaign_id="ab", control={}
            )
            fleet.start_device("site-0", {"step": 0.5})
            async with asyncio.timeout(PATIENCE_S):
                while kept.pending:
                    await asyncio.sleep(0.01)
            assert bool(kept.personal(f"m{pending[:4]}")) == is_kept


async def test_buffered_rounds(tmp_path: Path) -> None:
    """Slow agents carry over from round to round, over a restart, and are counted as they are."""
    steps, delays = (1.0, 2.0, 4.0, 8.0), (0.0, 0.1, 0.7, 1.2)
    async with Fleet(tmp_path) as fleet:
        for index, (step, delay_s) in enumerate(zip(steps, delays, strict=True)):
            options = {"step": step, "num_examples": 10, "delay_s": delay_s}
            await fleet.add(f"site-{index}", options, allow_plain=True)
        await fleet.until(lambda devices: sum(d.connected for d in devices) == len(steps))
        plan = campaign_plan(
            num_rounds=8,
            min_cohort=2,
            protection=pb.PROTECTION_PLAIN,
            buffer=pb.Buffer(size=2, max_staleness=20),
        )
        campaign_id = await fleet.start_campaign(plan)
        await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
        campaign = await fleet.finish(campaign_id)
        assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
        model = from_bytes(await fleet.operator.read(campaign.model_digest))
    numbers = {round_.round_id: round_.number for round_ in campaign.rounds}
    moved, staleness = 0.0, []
    for round_ in campaign.rounds:
        assert len(round_.survivors) >= 2
        for name in round_.survivors:
            stale = round_.number - numbers[round_.bases.get(name, round_.round_id)]
            staleness.append(stale)
            moved += steps[int(name[-1])] / len(round_.survivors) / np.sqrt(1 + stale)
    np.testing.assert_allclose(model["w"] - toy_model()["w"], moved, rtol=1e-4)
    assert max(staleness) > 0
