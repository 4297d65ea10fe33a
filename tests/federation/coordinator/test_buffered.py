"""Rounds that do not wait for slow devices."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation.coordinator.herald import Herald
from minga.federation.coordinator.rounds import (
    Base,
    Buffer,
    BufferedRound,
    DeadlinePassed,
    Finish,
    PlainUpdateUploaded,
    RoundOrder,
    Stage,
    SumComputed,
    TakePart,
    Timeouts,
    open_round,
)
from minga.federation.coordinator.rounds.buffered import discount
from minga.federation.device.trainer_process import TrainedUpdate
from minga.federation.errors import CampaignError
from minga.federation.parameters import read_parameters
from minga.federation.plain import PlainPlan
from minga.federation.trainer import TrainingConfig
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import PATIENCE_S, Desk, constant_update
from tests.federation.fleet import campaign_plan, toy_model

COUNTS = {"site-0": 10, "site-1": 30, "site-2": 20, "site-3": 40}
STEPS = {"site-0": 1.0, "site-1": 2.0, "site-2": 4.0, "site-3": 8.0}
NAMES = tuple(STEPS)


class TicketTrainer:
    """Moves every value by its step, once for each ticket that it is given."""

    def __init__(self, name: str, delay_s: float = 0.0, tickets: int = 0) -> None:
        self.name = name
        self.delay_s = delay_s
        self.tickets = asyncio.Semaphore(tickets)
        self.started_from: list[float] = []
        self.may_measure = asyncio.Event()
        self.may_measure.set()

    async def fit(self, model: Path, config: TrainingConfig) -> TrainedUpdate:
        update = constant_update(model, STEPS[self.name], COUNTS[self.name])
        self.started_from.append(float(read_parameters(model)["b"][0]))
        await self.tickets.acquire()
        await asyncio.sleep(self.delay_s)
        return update

    async def evaluate(self, model: Path, config: TrainingConfig) -> dict[str, float]:
        measured = float(read_parameters(model)["b"][0])
        await self.may_measure.wait()
        return {"b": measured, "num_examples": 1}


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and four devices without tickets, connected."""
    desk = Desk(tmp_path)
    desk.grace_s = 0.3
    for name in NAMES:
        desk.hire(name, TicketTrainer(name))
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


def plan_of(**changes: object) -> pb.CampaignPlan:
    numbers = {
        "num_rounds": 3,
        "protection": pb.PROTECTION_PLAIN,
        "min_cohort": 2,
        "buffer": pb.Buffer(size=2, max_staleness=2),
    }
    return campaign_plan(**{**numbers, **changes})


async def after_round(desk: Desk, campaign_id: str, number: int, *trained: str) -> None:
    """Let some devices finish their training, and wait until the next round is open."""
    for name in trained:
        desk.devices[name].trainer.tickets.release()
    async with asyncio.timeout(PATIENCE_S):
        async for campaign in desk.campaigns.watch(campaign_id):
            if len(campaign.rounds) > number:
                return


def movement(rounds: list[pb.Round]) -> float:
    """Compute from the records alone by how much the model moved; no update is in it twice."""
    numbers = {round_.round_id: round_.number for round_ in rounds}
    taken: set[tuple[str, str]] = set()
    total = 0.0
    for round_ in rounds:
        weights = sum(COUNTS[name] for name in round_.survivors)
        for name in round_.survivors:
            base = round_.bases.get(name, round_.round_id)
            assert (name, base) not in taken
            taken.add((name, base))
            stale = round_.number - numbers[base]
            total += STEPS[name] * COUNTS[name] / weights / np.sqrt(1 + stale)
    return total


def assert_exact(desk: Desk, campaign: pb.Campaign) -> None:
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert {round_.stage for round_ in campaign.rounds} == {pb.ROUND_STAGE_COMMITTED}
    for moved in desk.moved(campaign, toy_model()).values():
        np.testing.assert_allclose(moved, movement(list(campaign.rounds)), rtol=1e-5)


async def test_slow_devices_count_later_and_less(desk: Desk) -> None:
    """Two slow devices carry over, one into the second round and one into the third."""
    campaign_id = desk.start_campaign(plan_of(), toy_model())
    await after_round(desk, campaign_id, 1, "site-0", "site-1")
    await after_round(desk, campaign_id, 2, "site-0", "site-2")
    for name in ("site-3", "site-1"):
        desk.devices[name].trainer.tickets.release()
    campaign = await desk.finish(campaign_id)
    first, second, third = campaign.rounds
    assert list(first.survivors) == ["site-0", "site-1"]
    assert list(second.survivors) == ["site-0", "site-2"]
    assert dict(second.bases) == {"site-2": first.round_id, "site-3": first.round_id}
    assert list(third.survivors) == ["site-1", "site-3"]
    assert dict(third.bases) == {"site-1": second.round_id, "site-3": first.round_id}
    moves = [
        (10 * 1 + 30 * 2) / 40,
        (10 * 1 + 20 * 4 / np.sqrt(2)) / 30,
        (30 * 2 / np.sqrt(2) + 40 * 8 / np.sqrt(3)) / 70,
    ]
    assert movement(list(campaign.rounds)) == pytest.approx(sum(moves))
    assert_exact(desk, campaign)
    assert desk.devices["site-3"].trainer.started_from == [1.0]  # it was not disturbed
    for name, base in (("site-3", first), ("site-1", second)):
        end = await desk.devices[name].end_of(base.round_id)
        assert (end.committed, end.counted) == (True, True)
    left = await desk.devices["site-0"].end_of(third.round_id)
    assert (left.committed, left.counted) == (True, False)
    assert {d.device_id: d.rounds_counted for d in desk.store.devices()} == {
        "site-0": 2,
        "site-1": 2,
        "site-2": 1,
        "site-3": 1,
    }


async def test_too_stale_is_dropped(desk: Desk) -> None:
    """A device that would be more rounds behind than allowed is told so, and may start anew."""
    plan = plan_of(buffer=pb.Buffer(size=2, max_staleness=1))
    campaign_id = desk.start_campaign(plan, toy_model())
    await after_round(desk, campaign_id, 1, "site-0", "site-1")
    await after_round(desk, campaign_id, 2, "site-0", "site-1")
    for name in ("site-2", "site-3"):
        desk.devices[name].trainer.tickets.release()
    campaign = await desk.finish(campaign_id)
    first, second, third = campaign.rounds
    too_stale = "too stale: 2 rounds behind"
    assert dict(second.lost) == {"site-2": too_stale, "site-3": too_stale}
    assert (await desk.devices["site-3"].end_of(first.round_id)).reason == too_stale
    assert list(third.survivors) == ["site-2", "site-3"]
    assert not third.bases
    assert_exact(desk, campaign)


async def test_device_comes_back_to_its_base(desk: Desk) -> None:
    """A device that is killed while it carries over trains again from the model it started from."""
    campaign_id = desk.start_campaign(plan_of(), toy_model())
    slow = desk.devices["site-3"]
    await after_round(desk, campaign_id, 1, "site-0", "site-1")
    slow.leave(None)
    desk.connect("site-3")
    await after_round(desk, campaign_id, 2, "site-0", "site-3")
    for name in ("site-0", "site-1"):
        desk.devices[name].trainer.tickets.release()
    campaign = await desk.finish(campaign_id)
    assert list(campaign.rounds[1].survivors) == ["site-0", "site-3"]
    assert campaign.rounds[1].bases["site-3"] == campaign.rounds[0].round_id
    assert slow.trainer.started_from[:2] == [1.0, 1.0]
    assert_exact(desk, campaign)


async def test_measuring_leaves_those_who_train_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two rounds the free devices measure; who carries over counts in the next one."""
    evaluation = pb.Evaluation(metrics=["b"], clip=100.0)
    plan = plan_of(num_rounds=2, evaluation=evaluation, evaluate_every=1, invite_timeout_s=0.1)
    asked_again: list[str] = []
    ask = Herald.ask_again

    def note(herald: Herald, device_id: str) -> None:
        asked_again.append(device_id)
        ask(herald, device_id)

    monkeypatch.setattr(Herald, "ask_again", note)
    for device in desk.devices.values():
        device.trainer.may_measure.clear()
    campaign_id = desk.start_campaign(plan, toy_model())
    await after_round(desk, campaign_id, 1, "site-0", "site-1")
    for name in ("site-2", "site-3"):
        desk.devices[name].trainer.tickets.release()
    async with asyncio.timeout(PATIENCE_S):
        while len(asked_again) < 2:  # their answers came while the others still measure
            await asyncio.sleep(0.01)
    for device in desk.devices.values():
        device.trainer.may_measure.set()
    campaign = await desk.finish(campaign_id)
    works = [round_.work for round_ in campaign.rounds]
    assert works == [pb.ROUND_WORK_TRAINING, pb.ROUND_WORK_EVALUATION] * 2
    first, measured, second, _ = campaign.rounds
    assert list(measured.survivors) == ["site-0", "site-1"]
    assert measured.metrics["b"] == pytest.approx(1.0 + movement([first]), abs=1e-3)
    assert list(second.survivors) == ["site-2", "site-3"]
    assert set(second.bases.values()) == {first.round_id}


@pytest.mark.slow
async def test_killed_before_any_write(tmp_path: Path) -> None:
    """Killed between any two writes, the coordinator counts each update once, as stale as it is."""
    was_stale = False
    for lives in range(2, 60, 5):
        desk = Desk(tmp_path / str(lives))
        for index, name in enumerate(NAMES):
            desk.hire(name, TicketTrainer(name, delay_s=0.01 + 0.03 * index, tickets=1000))
        desk.start()
        campaign, was_killed = await desk.finish_over_a_kill(
            plan_of(num_rounds=4), toy_model(), lives
        )
        assert_exact(desk, campaign)
        was_stale |= any(set(r.bases) & set(r.survivors) for r in campaign.rounds)
        await desk.stop()
        if not was_killed:
            assert was_stale
            return
    raise AssertionError("no life was long enough")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protection": pb.PROTECTION_SECURE}, "masks cancel only among devices"),
        ({"scaffold": True}, "control variate"),
        ({"over_selection": 0.5}, "over_selection"),
        ({"buffer": pb.Buffer(size=5, max_staleness=1)}, "from min_cohort 2 to cohort 4"),
        ({"buffer": pb.Buffer(size=1, max_staleness=1)}, "from min_cohort 2 to cohort 4"),
        ({"buffer": pb.Buffer(size=2, max_staleness=51)}, "50 is the most"),
    ],
)
async def test_impossible_buffers(desk: Desk, changes: dict[str, object], message: str) -> None:
    """What cannot work is refused, with the reason; above all secure rounds."""
    with pytest.raises(CampaignError, match=message):
        desk.start_campaign(plan_of(**changes), toy_model())


# --- the machine --------------------------------------------------------------------------------


def round_of(*, carries: bool = True, deadline: bool = False) -> BufferedRound:
    """Give round 3 of a buffer of two, after site-0 answered, then site-3 or the deadline."""
    order = RoundOrder(
        round_id="cc" * 16,
        number=3,
        plan=PlainPlan(num_values=2, max_weight=100),
        invited=NAMES,
        min_cohort=1,
        goal=2,
        model_digest=bytes(32),
        training={},
        timeouts=Timeouts(),
        buffer=Buffer(
            max_staleness=2,
            carries=carries,
            bases={
                "site-1": Base(round_id="aa" * 16, number=1, model_digest=bytes([1] * 32)),
                "site-2": Base(round_id="bb" * 16, number=2, model_digest=bytes([2] * 32)),
            },
        ),
    )
    round_ = open_round(order, 0.0)
    assert isinstance(round_, BufferedRound)
    answered = ["site-0"] if deadline else ["site-0", "site-3"]
    for name in answered:
        update = PlainUpdateUploaded(device_id=name, digest=bytes(32), size=8, num_examples=1)
        round_.apply(update, 1.0)
    if deadline:
        round_.apply(DeadlinePassed(stage=Stage.UPDATES), 2.0)
    return round_


def test_who_goes_on() -> None:
    """With the buffer full, only who would be too stale is lost; a late answer changes nothing."""
    round_ = round_of()
    assert round_.stage is Stage.AGGREGATE
    assert round_.lost == {"site-1": "too stale: 3 rounds behind"}
    assert round_.carried == ("site-2",)
    late = PlainUpdateUploaded(device_id="site-2", digest=bytes(32), size=8, num_examples=1)
    assert not round_.changed_by(late)
    round_.apply(SumComputed(model_digest=bytes(32), total_weight=2), 3.0)
    assert round_.instruction("site-2") is None
    assert isinstance(round_.instruction("site-1"), Finish)
    assert round_.awaits_update("site-2")
    assert not round_.awaits_update("site-1")


def test_nobody_goes_on_from_the_last_round() -> None:
    """In a campaign's last round those who are not needed are let go."""
    round_ = round_of(carries=False)
    assert round_.carried == ()
    assert set(round_.lost) == {"site-1", "site-2"}


def test_deadline_lets_all_go() -> None:
    """Who still trains when the time is up has had it all."""
    round_ = round_of(deadline=True)
    assert round_.stage is Stage.AGGREGATE
    assert round_.carried == ()


def test_invitation_again_is_to_the_base() -> None:
    """A device that comes back is invited to the round, and the model, that it started from."""
    round_ = open_round(round_of().order, 0.0)
    told = round_.instruction("site-2")
    assert isinstance(told, TakePart)
    assert (told.order.round_id, told.order.model_digest) == ("bb" * 16, bytes([2] * 32))
    fresh = round_.instruction("site-3")
    assert isinstance(fresh, TakePart)
    assert fresh.order.round_id == "cc" * 16


def test_discount() -> None:
    """One round behind counts by 1/sqrt(2), three by a half; in time counts whole."""
    assert [discount(s) for s in (0, 1, 3)] == pytest.approx([1.0, 2**-0.5, 0.5])
