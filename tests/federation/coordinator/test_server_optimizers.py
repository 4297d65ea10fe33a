"""Server optimisers in campaigns: what they keep survives crashes, and nothing else does."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    initial_state,
    step,
)
from minga.federation.coordinator import campaigns, journal
from minga.federation.coordinator.aggregate import aggregate
from minga.federation.coordinator.rounds import SumComputed
from minga.federation.coordinator.store import EventRow
from minga.federation.errors import CampaignError, PeerError
from minga.federation.parameters import Layout, from_bytes, read_layout
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model

ADAM = FedAdam(learning_rate=0.1, beta_1=0.5, beta_2=0.75, tau=0.1)
OPTIMIZERS = [
    FedAvg(learning_rate=0.5),
    FedAvgM(learning_rate=0.5, momentum=0.9),
    FedAdagrad(learning_rate=0.1, beta_1=0.25, tau=0.1),
    ADAM,
    FedYogi(learning_rate=0.1, beta_1=0.5, beta_2=0.75, tau=0.1),
]
STEPS = (1.0, 1.0, -1.0)
MEAN = np.float32(1 / 3)

NUM_WRITES = 60
"""A campaign of two rounds with three devices makes fewer writes than this."""


def plan_of(optimizer: ServerOptimizer, **changes: object) -> pb.CampaignPlan:
    """Give a plan for three devices."""
    return campaign_plan(
        cohort=3,
        server_learning_rate=optimizer.learning_rate,
        server_optimizer=wire.optimizer_to_wire(optimizer),
        **changes,
    )


def reference(optimizer: ServerOptimizer, num_rounds: int) -> dict[str, np.ndarray]:
    """Give the toy model after some rounds, without a coordinator."""
    layout = Layout.of(toy_model())
    values = layout.flatten(toy_model())
    state = initial_state(optimizer, len(values))
    for _ in range(num_rounds):
        state, values = step(optimizer, state, values, np.full_like(values, MEAN))
    return layout.unflatten(values)


def open_desk(folder: Path, lives: int | None = None) -> Desk:
    """Start a coordinator whose three devices are connected."""
    desk = Desk(folder)
    for index, update in enumerate(STEPS):
        desk.enrol(f"site-{index}", update)
    desk.start(lives)
    desk.connect()
    return desk


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and three devices, connected."""
    desk = open_desk(tmp_path)
    yield desk
    await desk.stop()


def states_of(desk: Desk) -> list[tuple[str, ...]]:
    """Give the names of what each blob that is no model holds."""
    kept = [read_layout(path).names for path in (desk.folder / "blobs").glob("?" * 64)]
    return [names for names in kept if names != ("b", "w")]


async def begin_second_round(desk: Desk, plan: pb.CampaignPlan) -> str:
    """Start a campaign and wait until its second round is under way, its devices training."""
    campaign_id = desk.start_campaign(plan, toy_model())
    async with asyncio.timeout(10):
        async for campaign in desk.campaigns.watch(campaign_id):
            if campaign.rounds and campaign.rounds[0].stage >= pb.ROUND_STAGE_CONFIRM:
                desk.hold_training()
            if len(campaign.rounds) == 2 and campaign.rounds[1].stage == pb.ROUND_STAGE_UPDATES:
                return campaign_id
    raise AssertionError("the campaign ended before")


# --- what comes out ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
async def test_rounds_are_the_optimizers_steps(desk: Desk, optimizer: ServerOptimizer) -> None:
    """Three rounds of masked updates lead where three plain steps lead."""
    campaign_id = desk.start_campaign(plan_of(optimizer, num_rounds=3), toy_model())
    campaign = await desk.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    result = from_bytes(desk.blobs.read(campaign.model_digest))
    for name, values in reference(optimizer, 3).items():
        np.testing.assert_allclose(result[name], values, atol=1e-6)


async def test_plan_of_an_older_operator(desk: Desk) -> None:
    """A plan that says nothing of an optimiser means federated averaging at its rate."""
    plan = campaign_plan(cohort=3, server_learning_rate=0.5)
    assert wire.optimizer_from_wire(plan) == FedAvg(learning_rate=0.5)
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    for values in desk.moved(campaign, toy_model()).values():
        np.testing.assert_allclose(values, 0.5 * MEAN, atol=1e-6)


# --- what is kept ---


@pytest.mark.slow
async def test_killed_before_any_write(tmp_path: Path) -> None:
    """Killed between any two writes, the coordinator ends with the bytes of an undisturbed run."""
    desk = open_desk(tmp_path / "whole")
    campaign = await desk.finish(desk.start_campaign(plan_of(ADAM, num_rounds=2), toy_model()))
    undisturbed = campaign.model_digest
    await desk.stop()
    plan = plan_of(ADAM, num_rounds=2)
    for lives in range(1, NUM_WRITES, 3):
        desk = open_desk(tmp_path / str(lives))
        campaign, was_killed = await desk.finish_over_a_kill(plan, toy_model(), lives)
        assert campaign.model_digest == undisturbed, lives
        await desk.stop()
    assert not was_killed, "NUM_WRITES is too small to reach the campaign's last write"


async def test_restart_between_rounds(desk: Desk) -> None:
    """A coordinator that is started again goes on with the momentum of the rounds before."""
    campaign_id = await begin_second_round(desk, plan_of(ADAM, num_rounds=2))
    await desk.stop()
    desk.start()
    desk.connect()
    desk.blobs.collect(desk.campaigns.blobs_in_use())
    desk.release_training()
    campaign = await desk.finish(campaign_id)
    result = from_bytes(desk.blobs.read(campaign.model_digest))
    for name, values in reference(ADAM, 2).items():
        np.testing.assert_allclose(result[name], values, atol=1e-6)


async def test_one_state_is_kept_while_needed(desk: Desk) -> None:
    """There is one state between rounds, whatever their number, and none after the campaign."""
    campaign_id = await begin_second_round(desk, plan_of(ADAM, num_rounds=4))
    assert states_of(desk) == [("momentum", "variance")]
    desk.release_training()
    await desk.finish(campaign_id)
    assert states_of(desk) == []


async def test_cancelled_campaign_keeps_no_state(desk: Desk) -> None:
    """What was kept for the next round goes when there will be none."""
    campaign_id = await begin_second_round(desk, plan_of(ADAM, num_rounds=4))
    desk.campaigns.cancel(campaign_id, "operator/operator")
    desk.release_training()
    await desk.finish(campaign_id)
    assert states_of(desk) == []


async def test_aborted_round_changes_nothing(desk: Desk) -> None:
    """A round that fails leaves the state to the next one."""
    campaign_id = await begin_second_round(desk, plan_of(ADAM, num_rounds=2))
    desk.campaigns.lose("site-0", "gone")
    desk.release_training()
    campaign = await desk.finish(campaign_id)
    stages = [pb.ROUND_STAGE_COMMITTED, pb.ROUND_STAGE_ABORTED, pb.ROUND_STAGE_COMMITTED]
    assert [round_.stage for round_ in campaign.rounds] == stages
    result = from_bytes(desk.blobs.read(campaign.model_digest))
    for name, values in reference(ADAM, 2).items():
        np.testing.assert_allclose(result[name], values, atol=1e-6)


async def test_sum_may_be_made_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a sum a second time gives the same model and the same state, byte by byte."""
    sums: list[tuple[SumComputed, SumComputed]] = []

    def twice(*args: Any) -> SumComputed:
        one, again = (aggregate(*args) for _ in range(2))
        sums.append((one, again))
        return one

    monkeypatch.setattr(campaigns, "aggregate", twice)
    campaign_id = desk.start_campaign(plan_of(ADAM, num_rounds=3), toy_model())
    await desk.finish(campaign_id)
    assert len(sums) == 3
    assert all(one == again and one.optimizer_digest for one, again in sums)
    assert len({one.optimizer_digest for one, _ in sums}) == 3


def test_journal_keeps_the_state() -> None:
    """The event that commits a round names the state; one written before there were states none."""
    event = SumComputed(model_digest=bytes(32), total_weight=3, optimizer_digest=bytes(range(32)))
    row = journal.encode("00" * 16, event, 1.0)
    assert journal.decode(row) == event
    values = json.loads(row.payload)
    del values["optimizer_digest"]
    older = EventRow(at=1.0, device_id="", kind=row.kind, payload=json.dumps(values).encode())
    assert journal.decode(older) == SumComputed(model_digest=bytes(32), total_weight=3)


# --- what is refused ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_plan_carries_the_optimizer(optimizer: ServerOptimizer) -> None:
    """What goes into a plan comes out of it."""
    plan = pb.CampaignPlan.FromString(plan_of(optimizer).SerializeToString())
    assert wire.optimizer_from_wire(plan) == optimizer


def test_unknown_optimizer() -> None:
    """An optimiser of a later version is refused, and not taken for averaging."""
    message = pb.ServerOptimizer.FromString(bytes([0x7A, 0x00]))  # field 15
    with pytest.raises(PeerError, match="no server optimiser that this coordinator knows"):
        wire.optimizer_from_wire(campaign_plan(server_optimizer=message))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server_optimizer": pb.ServerOptimizer()}, "names no server optimiser"),
        (
            {"server_optimizer": pb.ServerOptimizer(fedadam=pb.FedAdam(beta_1=0.9, beta_2=0.99))},
            "tau is 0; it must be above 0",
        ),
        (
            {"server_optimizer": pb.ServerOptimizer(fedyogi=pb.FedYogi(beta_1=1.0, tau=0.1))},
            "beta_1 is 1; it must be from 0 to below 1",
        ),
        (
            {"server_optimizer": pb.ServerOptimizer(fedavgm=pb.FedAvgM(momentum=-0.5))},
            "momentum is -0.5; it must be",
        ),
        ({"training": wire.config_to_wire({"proximal_mu": -1.0})}, "proximal_mu is -1.0; give"),
        ({"training": wire.config_to_wire({"proximal_mu": "big"})}, "proximal_mu is 'big'; give"),
    ],
)
async def test_impossible_plan(desk: Desk, changes: dict[str, object], message: str) -> None:
    """A plan whose optimiser or whose pull cannot work is refused when it is started."""
    with pytest.raises(CampaignError, match=message):
        desk.start_campaign(campaign_plan(cohort=3, **changes), toy_model())
    assert desk.campaigns.describe() == []
