"""Differential privacy in campaigns, over real gRPC: bounds, noise, ledger, budget."""

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
from minga.federation.errors import BudgetError, CampaignError, PeerError
from minga.federation.parameters import from_bytes
from minga.federation.secagg.plan import RoundPlan
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import Fleet, campaign_plan, toy_model

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


def with_quantile(plan: pb.CampaignPlan) -> pb.CampaignPlan:
    """Let a plan's bound follow the updates."""
    plan.privacy.quantile, plan.privacy.quantile_rate = 0.5, 0.2
    return plan


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
    assert loaded_by
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


async def test_bound_follows_the_updates(fleet: Fleet) -> None:
    """Round by round the bound comes down to the updates' lengths, and is used and recorded."""
    for index in range(6):
        await fleet.add(f"site-{index}", {"step": 0.001}, allow_plain=True)  # a length of 0.032
    plan = private_plan(0.1, num_rounds=3, cohort=6, min_cohort=6, protection=2)
    plan = with_quantile(plan)
    plan.privacy.quantile_rate = 1.0
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    bounds = [MAX_NORM, *(round_.privacy.max_norm for round_ in campaign.rounds)]
    # All are within the bound, so it shrinks by exp(-0.5), give or take the noise on the share.
    for before, after in pairwise(bounds):
        assert 0.59 < after / before < 0.85
    noise = await steps(fleet, campaign) - 0.003
    multiplier = AdaptiveClip(quantile=0.5, learning_rate=1.0).update_noise(0.1, 6)
    std = multiplier * np.linalg.norm(bounds[:3]) / 6
    assert stats.kstest(noise / std, "norm").pvalue > 1e-4
    assert campaign.rounds[-1].privacy.epsilon == pytest.approx(epsilon_after(0.1, 3))


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
        (with_quantile(private_plan(1.0)), "takes plain rounds"),
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
        "secure quantile",
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
