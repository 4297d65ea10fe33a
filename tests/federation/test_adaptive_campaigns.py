"""Adaptive server optimisers over real gRPC with mutual TLS and secure aggregation."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.aggregation.optimizers import FedAdam, initial_state, step
from minga.federation.parameters import Layout, from_bytes
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan, toy_model

ADAM = FedAdam(learning_rate=0.1, beta_1=0.5, beta_2=0.75, tau=0.1)
STEPS = (1.0, 1.0, -1.0, 1.0)
MEAN = np.float32(0.5)
NUM_ROUNDS = 3


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator and four devices whose training takes a moment."""
    async with Fleet(tmp_path) as fleet:
        for index, update in enumerate(STEPS):
            options = {"step": update, "num_examples": 100, "delay_s": 0.3}
            await fleet.add(f"site-{index}", options)
        yield fleet


def adam_plan() -> pb.CampaignPlan:
    """Give a plan of three rounds with FedAdam."""
    return campaign_plan(
        num_rounds=NUM_ROUNDS,
        server_learning_rate=ADAM.learning_rate,
        server_optimizer=wire.optimizer_to_wire(ADAM),
    )


async def assert_reference(fleet: Fleet, campaign: pb.Campaign) -> None:
    """The campaign's model is that of as many plain steps in this process."""
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert [r.stage for r in campaign.rounds] == [pb.ROUND_STAGE_COMMITTED] * NUM_ROUNDS
    layout = Layout.of(toy_model())
    values = layout.flatten(toy_model())
    state = initial_state(ADAM, len(values))
    for _ in range(NUM_ROUNDS):
        state, values = step(ADAM, state, values, np.full_like(values, MEAN))
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    np.testing.assert_allclose(layout.flatten(result), values, atol=1e-6)


async def test_campaign_with_fedadam(fleet: Fleet) -> None:
    """Rounds over the wire lead where FedAdam's steps lead; the plan tells what was used."""
    campaign = await fleet.finish(await fleet.start_campaign(adam_plan()))
    assert wire.optimizer_from_wire(campaign.plan) == ADAM
    await assert_reference(fleet, campaign)


async def test_momentum_outlives_the_coordinator(fleet: Fleet) -> None:
    """Stopped and started again after each round, the coordinator goes on with its momentum."""
    campaign_id = await fleet.start_campaign(adam_plan())
    for number in range(2, NUM_ROUNDS + 1):
        await reach_round(fleet, campaign_id, number)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
    await assert_reference(fleet, await fleet.finish(campaign_id))


async def reach_round(fleet: Fleet, campaign_id: str, number: int) -> None:
    """Wait until a round has begun, and so the one before it is committed."""
    async with asyncio.timeout(PATIENCE_S):
        async for campaign in fleet.operator.watch(campaign_id):
            if len(campaign.rounds) == number:
                return
