"""Devices that keep something for themselves, over real gRPC."""

import asyncio
from pathlib import Path

import numpy as np

from minga.federation.device.keepsakes import Keepsakes
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan

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
