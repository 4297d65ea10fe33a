"""Differential privacy in campaigns, over real gRPC: bounds, noise, ledger, budget."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from itertools import pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from minga.federation import wire
from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.ledger import Budget, Gaussian, Ledger
from minga.federation.aggregation.privacy import Privacy
from minga.federation.aggregation.rules import Median
from minga.federation.coordinator.hub import Connection
from minga.federation.errors import BudgetError, CampaignError, PeerError
from minga.federation.parameters import from_bytes
from minga.federation.secagg.plan import RoundPlan, context_digest
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan, toy_model

NUM_VALUES = 1007
MAX_NORM = 2.0
DELTA = 1e-5
STRATEGY = pb.FlowerStrategy(reference="flwr.server.strategy:FedAvg")


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator without devices."""
    async with Fleet(tmp_path) as fleet:
        yield fleet


def private_plan(
    noise_multiplier: float, *, distributed: bool = False, epsilon: float = 1e9, **changes: object
) -> pb.CampaignPlan:
    """Give a plan with noise."""
    privacy = Privacy(
        budget=Budget(epsilon=epsilon, delta=DELTA),
        noise_multiplier=noise_multiplier,
        max_norm=MAX_NORM,
        is_distributed=distributed,
    )
    return campaign_plan(privacy=wire.privacy_to_wire(privacy), **changes)


def with_quantile(plan: pb.CampaignPlan, rate: float = 0.2) -> pb.CampaignPlan:
    """Let a plan's bound follow the updates."""
    plan.privacy.quantile, plan.privacy.quantile_rate = 0.5, rate
    return plan


def noise_std(plan: pb.CampaignPlan, record: pb.Round, bound: float) -> float:
    """Say how strong the noise on each value of a round's mean is, on updates of some bound."""
    num, multiplier = len(record.survivors), plan.privacy.noise_multiplier
    if not plan.privacy.distributed:
        adaptive = AdaptiveClip(quantile=0.5, learning_rate=1.0)
        return adaptive.update_noise(multiplier, num) * bound / num
    _, encoding = wire.round_plan(
        plan,
        round_id=record.round_id,
        model_digest=record.model_digest,
        training={},
        num_values=NUM_VALUES,
        num_invited=len(record.invited),
    )
    max_level = (1 << (record.plan.value_bits - 1)) - 1
    return sqrt(num * encoding.variance) * record.plan.clip / max_level / num


async def steps(fleet: Fleet, campaign: pb.Campaign) -> np.ndarray:
    """Say by how much a campaign moved each value of its model."""
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    return np.concatenate([(result[n] - v).ravel() for n, v in toy_model().items()])


def epsilon_after(noise_multiplier: float, num_rounds: int) -> float:
    """Give what so many rounds with central noise spend."""
    ledger, plenty = Ledger(), Budget(epsilon=1e12, delta=DELTA)
    for _ in range(num_rounds):
        ledger = ledger.spend(Gaussian(noise_multiplier=noise_multiplier), plenty)
    return ledger.epsilon(DELTA)


async def test_the_loop_does_not_wait_for_the_accountant(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that counts privacy takes a second to load: that is for another thread."""
    loaded_by: list[threading.Thread] = []

    class Witness:
        """Sees who loads the package, and leaves the loading to others."""

        def find_spec(self, name: str, *_: object) -> None:
            """Take down the thread."""
            if name == "dp_accounting":
                loaded_by.append(threading.current_thread())

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "dp_accounting"]:
            monkeypatch.delitem(sys.modules, name)
        loaded_by.clear()

    monkeypatch.setattr(sys, "meta_path", [Witness(), *sys.meta_path])
    forget()
    campaign_id = await fleet.start_campaign(private_plan(1.0))
    assert loaded_by
    assert threading.main_thread() not in loaded_by
    await fleet.stop_coordinator()
    forget()
    await fleet.start_coordinator()
    async with asyncio.timeout(PATIENCE_S):
        while not loaded_by:
            await asyncio.sleep(0.01)
    await fleet.operator.cancel(campaign_id)
    assert threading.main_thread() not in loaded_by


@pytest.mark.parametrize("distributed", [False, True], ids=["central", "distributed"])
def test_private_rounds_are_not_rotated(distributed: bool) -> None:
    """The bound is on an update's length as it is, and the noise is sized for its coordinates."""
    for plan, rotated in (
        (campaign_plan(rotate=True), True),
        (private_plan(1.0, distributed=distributed, rotate=True), False),
    ):
        derived, _ = wire.round_plan(
            plan,
            round_id="ab" * 16,
            model_digest=bytes(32),
            training={},
            num_values=NUM_VALUES,
            num_invited=4,
        )
        assert isinstance(derived, RoundPlan)
        assert derived.rotate is rotated


@pytest.mark.parametrize("protection", [pb.PROTECTION_PLAIN, pb.PROTECTION_SECURE])
async def test_coordinators_noise(fleet: Fleet, protection: int) -> None:
    """The mean is that of shortened updates, each counted once, and has the noise asked for."""
    # Lengths are 31.7 times the step: the first three are within 2, the last is cut to it.
    for index, step in enumerate([0.01, 0.03, 0.02, 5.0]):
        options = {"step": step, "num_examples": 1000 if index == 0 else 1}
        await fleet.add(f"site-{index}", options, allow_plain=True)
    noise_multiplier = 0.05
    plan = private_plan(noise_multiplier, protection=protection, min_cohort=4)
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    moved = await steps(fleet, campaign)
    std = noise_multiplier * MAX_NORM / 4
    noise = moved - (0.06 + MAX_NORM / sqrt(NUM_VALUES)) / 4
    assert stats.kstest(noise / std, "norm").pvalue > 1e-4
    [round_] = campaign.rounds
    assert round_.total_weight == 4
    assert round_.privacy.delta == DELTA
    assert round_.privacy.epsilon == pytest.approx(epsilon_after(noise_multiplier, 1))


async def test_devices_noise(fleet: Fleet) -> None:
    """Masked updates carry the noise: with all of a cohort there, more than was asked for."""
    for index in range(6):
        await fleet.add(f"site-{index}", {"step": 0.02})
    plan = private_plan(
        0.2, distributed=True, cohort=6, min_cohort=5, expected_dropout=0.17, colluder_share=0.1
    )
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    moved = await steps(fleet, campaign)
    # Of six, one may be lost and one may collude: the noise of four is what was asked for.
    std = 0.2 * MAX_NORM * sqrt(6 / 4) / 6
    assert stats.kstest((moved - 0.02) / std, "norm").pvalue > 1e-4
    [round_] = campaign.rounds
    # Nobody was lost, so five honest ones hid each other, and less was spent than planned.
    spent = epsilon_after(0.2 * sqrt(5 / 4), 1)
    assert spent < round_.privacy.epsilon < 1.1 * spent
    assert round_.plan.max_weight == 1


async def test_lost_device_takes_its_noise_along(fleet: Fleet) -> None:
    """What a round spends follows from the devices that are in the sum."""
    for index in range(6):
        await fleet.add(f"site-{index}", {"step": 0.02, "fail": "broken" if index == 5 else ""})
    plan = private_plan(
        0.2, distributed=True, cohort=6, min_cohort=5, expected_dropout=0.17, colluder_share=0.1
    )
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    moved = await steps(fleet, campaign)
    std = 0.2 * MAX_NORM * sqrt(5 / 4) / 5
    assert stats.kstest((moved - 0.02) / std, "norm").pvalue > 1e-4
    planned = epsilon_after(0.2, 1)
    assert planned < campaign.rounds[0].privacy.epsilon < 1.1 * planned


async def test_owners_least_noise(fleet: Fleet) -> None:
    """A device that wants more noise than a round has leaves it, whatever the coordinator says."""
    for index, least in enumerate([0.0] * 6 + [0.15, 0.3]):
        await fleet.add(f"site-{index}", {"step": 0.01}, allow_plain=True, min_noise=least)
    plan = private_plan(0.2, distributed=True, cohort=8, min_cohort=6)
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    [round_] = campaign.rounds
    assert list(round_.lost) == ["site-7"]
    assert "owner wants 0.3 or more" in round_.lost["site-7"]
    for protection in (pb.PROTECTION_PLAIN, pb.PROTECTION_SECURE):
        noiseless = campaign_plan(cohort=8, min_cohort=6, protection=protection)
        campaign = await fleet.finish(await fleet.start_campaign(noiseless))
        [round_] = campaign.rounds
        assert sorted(round_.lost) == ["site-6", "site-7"]
        assert "a noise multiplier of 0;" in round_.lost["site-6"]


async def test_least_noise_of_those_who_are_left(fleet: Fleet) -> None:
    """Devices that are lost take their noise along: too little of it, and nothing is unmasked."""
    for index in range(8):
        options = {"step": 0.01, "fail": "no more data" if index > 5 else ""}
        await fleet.add(f"site-{index}", options, min_noise=0.2)
    plan = private_plan(0.2, distributed=True, cohort=8, min_cohort=3)
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    left = [campaign.rounds[0].lost[f"site-{index}"] for index in range(6)]
    assert all("6 devices assure a noise multiplier of 0.183;" in reason for reason in left)


async def test_campaigns_share_one_budget(fleet: Fleet) -> None:
    """What one campaign spent is missing to the next, also after a restart."""
    for index in range(3):
        await fleet.add(f"site-{index}", {"step": 0.01}, allow_plain=True)
    budget = (epsilon_after(2.0, 3) + epsilon_after(2.0, 4)) / 2
    plan = private_plan(2.0, epsilon=budget, num_rounds=4, cohort=3, protection=2)
    with pytest.raises(BudgetError, match="4 more rounds would bring"):
        await fleet.start_campaign(plan)
    plan.num_rounds = 3
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    spent = [round_.privacy.epsilon for round_ in campaign.rounds]
    assert spent == pytest.approx([epsilon_after(2.0, n) for n in (1, 2, 3)])
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    plan.num_rounds = 1
    with pytest.raises(BudgetError, match="1 more round would bring what was spent to epsilon"):
        await fleet.start_campaign(plan)
    # Without noise nothing is promised, so nothing is counted.
    done = await fleet.finish(await fleet.start_campaign(campaign_plan(cohort=3)))
    assert done.state == pb.CAMPAIGN_STATE_COMPLETED
    assert not done.rounds[0].HasField("privacy")


@pytest.mark.parametrize(
    ("protection", "distributed"),
    [(pb.PROTECTION_PLAIN, False), (pb.PROTECTION_SECURE, False), (pb.PROTECTION_SECURE, True)],
    ids=["plain", "secure", "distributed"],
)
async def test_bound_follows_the_updates(fleet: Fleet, protection: int, distributed: bool) -> None:
    """Round by round the bound comes down to the updates' lengths, also over a restart."""
    for index in range(6):
        await fleet.add(f"site-{index}", {"step": 0.001}, allow_plain=True)  # a length of 0.032
    plan = private_plan(
        0.1,
        distributed=distributed,
        num_rounds=3,
        cohort=6,
        min_cohort=6,
        expected_dropout=0.0,
        protection=protection,
    )
    plan = with_quantile(plan, rate=1.0)
    campaign_id = await fleet.start_campaign(plan)
    await fleet.reach(campaign_id, pb.ROUND_STAGE_COMMITTED)
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    campaign = await fleet.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    committed = [r for r in campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED]
    assert len(committed) == 3
    bounds = [MAX_NORM, *(round_.privacy.max_norm for round_ in committed)]
    # All are within the bound, so it shrinks by exp(-0.5), give or take the noise on the share.
    for before, after in pairwise(bounds):
        assert 0.59 < after / before < 0.85
    if protection == pb.PROTECTION_SECURE:
        for round_, bound in zip(committed, bounds, strict=False):
            assert round_.plan.num_values == NUM_VALUES + 1  # the bit
            assert round_.plan.clip / committed[0].plan.clip == pytest.approx(bound / MAX_NORM)
    stds = [noise_std(plan, *pair) for pair in zip(committed, bounds, strict=False)]
    noise = await steps(fleet, campaign) - 0.003
    assert stats.kstest(noise / np.linalg.norm(stds), "norm").pvalue > 1e-4
    slack = 1.1 if distributed else 1 + 1e-6
    spent = campaign.rounds[-1].privacy.epsilon
    assert 1 - 1e-6 <= spent / epsilon_after(0.1, 3) < slack


async def test_bound_grows_where_updates_are_longer(fleet: Fleet) -> None:
    """Updates that were shortened say so under their masks, and the bound goes up."""
    for index in range(6):
        await fleet.add(f"site-{index}", {"step": 0.5 if index else 0.01})
    plan = private_plan(0.1, distributed=True, cohort=6, min_cohort=6, expected_dropout=0.0)
    campaign = await fleet.finish(await fleet.start_campaign(with_quantile(plan, rate=1.0)))
    [round_] = campaign.rounds
    # One of six is within: by exp(0.5 - 1 / 6), give or take a twentieth of noise.
    assert round_.privacy.max_norm / MAX_NORM == pytest.approx(np.exp(1 / 3), rel=0.3)
    assert round_.privacy.max_norm > MAX_NORM


async def test_one_device_is_told_another_bound(fleet: Fleet) -> None:
    """A coordinator that tells one device another bound than the rest gets no sum at all."""
    send = Connection.send

    def lie(connection: Connection, message: pb.SessionResponse) -> bool:
        if connection.device_id == "site-0" and message.HasField("invite"):
            message.invite.private_update.max_norm *= 0.5
        return send(connection, message)

    for index in range(4):
        await fleet.add(f"site-{index}", {"step": 0.01})
    plan = private_plan(0.1, distributed=True, min_cohort=4, expected_dropout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "send", lie)
        # It hands the advert on, though it is not signed for the round that it told the others.
        patch.setattr("minga.federation.coordinator.campaigns.check_proof", lambda *_: None)
        campaign = await fleet.finish(await fleet.start_campaign(with_quantile(plan)))
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    for round_ in campaign.rounds:
        assert not round_.survivors
        assert "SignatureError on the device" in "; ".join(round_.lost.values())


async def test_plain_update_that_is_too_long_is_cut(fleet: Fleet) -> None:
    """A device that does not shorten its update is no more in the mean than one that does."""
    for index in range(3):
        await fleet.add(f"site-{index}", {"step": 50.0 if index else 0.0}, allow_plain=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "minga.federation.device.participant.clip_length", lambda delta, _: (delta, True)
        )
        plan = private_plan(1e-4, cohort=3, protection=pb.PROTECTION_PLAIN)
        campaign = await fleet.finish(await fleet.start_campaign(plan))
    moved = await steps(fleet, campaign)
    assert np.linalg.norm(moved) == pytest.approx(2 * MAX_NORM / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (private_plan(1.0, rule=wire.rule_to_wire(Median()), protection=2), "takes the mean"),
        (
            private_plan(1.0, num_groups=2, cohort=8, min_cohort=8, expected_dropout=0.0),
            "takes one sum",
        ),
        (private_plan(1.0, distributed=True, protection=2), "in secure rounds"),
        (private_plan(1e-9, distributed=True), "no levels suit a noise_multiplier of 1e-09"),
        (
            private_plan(1.0, protection=2, flower_strategy=STRATEGY),
            "takes the place of rule and privacy",
        ),
        (with_quantile(private_plan(1.0)), "takes more than 10 devices"),
        (with_quantile(private_plan(1.0, distributed=True)), "takes more than 10 devices"),
        (with_quantile(private_plan(1.0, protection=2)), "takes more than 10 devices"),
        (campaign_plan(privacy=pb.Privacy(epsilon=1.0, delta=2.0)), "delta is 2"),
        (campaign_plan(privacy=pb.Privacy(epsilon=1.0, delta=0.1)), "noise_multiplier is 0"),
    ],
    ids=[
        "rule",
        "groups",
        "plain",
        "no noise",
        "strategy",
        "few in the clear sum",
        "few that add noise",
        "few",
        "delta",
        "nothing",
    ],
)
async def test_privacy_that_cannot_work(fleet: Fleet, plan: pb.CampaignPlan, reason: str) -> None:
    """A campaign that could not keep its promise is refused before it starts."""
    with pytest.raises(CampaignError, match=reason):
        await fleet.start_campaign(plan)


async def test_campaign_beyond_the_budget_from_the_start(fleet: Fleet) -> None:
    """A budget that is too small for one round is told at once."""
    with pytest.raises(BudgetError, match=r"to epsilon 4\.37"):
        await fleet.start_campaign(private_plan(1.0, epsilon=4.0))


def test_the_context_names_bound_noise_and_bit() -> None:
    """What a device does to its update before it masks is in the plan's digest, by these names."""
    plan = with_quantile(private_plan(0.2, distributed=True, cohort=10, min_cohort=8))
    values = {"round_id": "00" * 16, "model_digest": bytes(32), "num_values": 100}
    made, encoding = wire.round_plan(plan, num_invited=10, training={"lr": 0.1}, **values)
    assert made.num_values == 101
    told = {
        "lr": 0.1,
        "private_update.max_norm": MAX_NORM,
        "private_update.variance": encoding.variance,
        "private_update.bit_level": encoding.bit_level,
    }
    assert made.context_digest == context_digest(bytes(32), told)
    fixed, encoding = wire.round_plan(
        private_plan(0.2, distributed=True, cohort=10, min_cohort=8),
        num_invited=10,
        training={"lr": 0.1},
        **values,
    )
    told["private_update.variance"] = encoding.variance
    del told["private_update.bit_level"]
    assert fixed.context_digest == context_digest(bytes(32), told)


@pytest.mark.parametrize(
    "change", [{"variance": 5}, {"max_norm": MAX_NORM / 2}, {"bit_level": 1}, {"bit_level": 0}]
)
def test_another_bound_for_some_is_another_round(change: dict[str, float]) -> None:
    """Devices that are told different bounds, bits or noise agree on no digest: nothing cancels."""
    plan = with_quantile(private_plan(0.5, distributed=True, cohort=10, min_cohort=8))
    values = {"round_id": "00" * 16, "model_digest": bytes(32), "num_values": 100, "training": {}}
    made, encoding = wire.round_plan(plan, num_invited=10, **values)
    invite = pb.RoundInvite(
        round_id="00" * 16,
        model_digest=bytes(32),
        plan=wire.plan_to_wire(made),
        private_update=wire.encoding_to_wire(encoding),
    )
    assert wire.plan_of_invite(invite) == made
    assert wire.encoding_of_invite(invite) == encoding
    for name, value in change.items():
        setattr(invite.private_update, name, value)
    assert wire.plan_of_invite(invite).digest != made.digest


def test_less_noise_for_some_is_another_round() -> None:
    """Devices that are told different noise agree on no context, so no masks cancel."""
    plan = private_plan(1.0, distributed=True, cohort=10, min_cohort=8)
    values = {"round_id": "00" * 16, "model_digest": bytes(32), "num_values": 100, "training": {}}
    made, encoding = wire.round_plan(plan, num_invited=10, **values)
    invite = pb.RoundInvite(
        round_id="00" * 16,
        model_digest=bytes(32),
        plan=wire.plan_to_wire(made),
        private_update=wire.encoding_to_wire(encoding),
    )
    assert wire.plan_of_invite(invite) == made
    invite.private_update.variance //= 2
    assert wire.plan_of_invite(invite).digest != made.digest
    invite.ClearField("private_update")
    assert wire.plan_of_invite(invite).digest != made.digest


def test_impossible_noise_in_an_invitation() -> None:
    """A device refuses an invitation whose noise could not be drawn."""
    invite = pb.RoundInvite(private_update=pb.PrivateUpdate(max_norm=1.0, variance=1))
    with pytest.raises((PeerError, ValueError), match="a device's noise has a variance of 1"):
        wire.encoding_of_invite(invite)
