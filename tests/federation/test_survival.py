"""A coordinator process that is killed in every stage of a round, and started again."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation.errors import IdentityError, UnreachableError
from minga.federation.operator import connect
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan, toy_model

pytestmark = pytest.mark.slow

LEVELS = 2**15 - 1  # of 16 bits; with clip 1.0 a level is exactly 1 / LEVELS
STEPS = {f"site-{index}": 1000 * 2**index for index in range(5)}
"""Device -> its update in levels: the sum of any of them tells which they were."""

STAGES = [
    pb.ROUND_STAGE_KEYS,
    pb.ROUND_STAGE_SHARES,
    pb.ROUND_STAGE_UPDATES,
    pb.ROUND_STAGE_CONFIRM,
    pb.ROUND_STAGE_UNMASK,
    pb.ROUND_STAGE_AGGREGATE,
    pb.ROUND_STAGE_COMMITTED,
]
MODEL = toy_model(100_000)


class ProcessFleet(Fleet):
    """Devices here, their coordinator in a process of its own, as an operator runs it."""

    async def start_coordinator(self) -> None:
        """Start the process, on the device port that it had before."""
        state = self.folder / "coordinator"
        command = f"coordinator run --port {self.ports['port']} --enrol-port 0 --metrics-port 0"
        with (self.folder / "coordinator.log").open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "minga.cli", *command.split(), "--state", str(state)),
                stderr=log,
            )
        async with asyncio.timeout(PATIENCE_S):
            while not await self._is_up(state):
                await asyncio.sleep(0.05)
        self.ports["port"] = int(self.operator.address.rpartition(":")[2])

    async def _is_up(self, state: Path) -> bool:
        assert self.process.returncode is None, "the coordinator ended by itself"
        try:
            self.operator = await self._coordinator_stack.enter_async_context(connect(state))
            await self.operator.status()
        except (IdentityError, UnreachableError):
            await self._coordinator_stack.aclose()
            return False
        return True

    async def stop_coordinator(self) -> None:
        """Kill the process: nothing of it runs any more."""
        self.process.kill()
        await self.process.wait()
        await self._coordinator_stack.aclose()

    async def kill_in(self, campaign_id: str, number: int, stage: int) -> None:
        """Kill the coordinator as soon as a round is seen in a stage, or past it."""
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in self.operator.watch(campaign_id):
                now = [r.stage for r in campaign.rounds if r.number >= number]
                if now and max(now) >= stage:
                    break
        await self.stop_coordinator()

    async def assert_exact(self, campaign: pb.Campaign) -> None:
        """The model moved by the exact mean of each committed round's devices, each once."""
        assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
        committed = [r for r in campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED]
        assert len(committed) == campaign.plan.num_rounds
        moved = 0.0
        counted = dict.fromkeys(STEPS, 0)
        for round_ in committed:
            levels = [STEPS[name] for name in round_.survivors]
            moved += sum(levels) / len(levels) / LEVELS
            assert round_.total_weight == 100 * len(levels)
            for name in round_.survivors:
                counted[name] += 1
        model = from_bytes(await self.operator.read(campaign.model_digest))
        for name, value in MODEL.items():
            np.testing.assert_allclose(model[name] - value, moved, atol=1e-5)
        devices = await self.operator.devices()
        assert {d.device_id: d.rounds_counted for d in devices} == counted

    async def start_exact_campaign(self, **changes: object) -> str:
        """Start a campaign over all devices."""
        plan = campaign_plan(**{"cohort": len(STEPS), "expected_dropout": 0.2, **changes})
        return await self.start_campaign(plan, MODEL)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[ProcessFleet]:
    """A coordinator process and five devices whose training takes a moment."""
    async with ProcessFleet(tmp_path) as fleet:
        for name, levels in STEPS.items():
            options = {"step": levels / LEVELS, "num_examples": 100, "delay_s": 0.3}
            await fleet.add(name, options)
        yield fleet


async def test_killed_in_every_stage(fleet: ProcessFleet) -> None:
    """Killed once in each stage, one round after the other, it comes to the exact sum."""
    campaign_id = await fleet.start_exact_campaign(num_rounds=len(STAGES))
    for number, stage in enumerate(STAGES, start=1):
        await fleet.kill_in(campaign_id, number, stage)
        await fleet.start_coordinator()
    await fleet.assert_exact(await fleet.finish(campaign_id))


async def test_device_lost_while_there_is_no_coordinator(fleet: ProcessFleet) -> None:
    """A device that vanishes together with the coordinator is unmasked by the others."""
    campaign_id = await fleet.start_exact_campaign(training_timeout_s=8.0)
    await fleet.kill_in(campaign_id, 1, pb.ROUND_STAGE_UPDATES)
    await fleet.stop_device("site-4")
    await fleet.start_coordinator()
    campaign = await fleet.finish(campaign_id)
    assert "site-4" not in campaign.rounds[0].survivors
    await fleet.assert_exact(campaign)


async def test_cancelled_campaign_stays_cancelled(fleet: ProcessFleet) -> None:
    """A campaign that was cancelled right before the coordinator was killed stays so."""
    campaign_id = await fleet.start_exact_campaign()
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    await fleet.operator.cancel(campaign_id)
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    campaign = await fleet.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_CANCELLED
    assert [round_.stage for round_ in campaign.rounds] == [pb.ROUND_STAGE_ABORTED]
    following = await fleet.finish(await fleet.start_exact_campaign())
    await fleet.assert_exact(following)
