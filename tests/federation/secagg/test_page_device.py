"""The protocol's page says enough: a device written from it takes part in rounds of every kind.

Rounds are ordered by the product's coordinator; the other device gets the invitation's bytes.
"""

import math

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.aggregation.privacy import clip_length
from minga.federation.analytics import Part, Question
from minga.federation.coordinator.campaign import Campaign
from minga.federation.plain import update_to_bytes
from minga.federation.secagg.device import Step
from minga.federation.secagg.plan import RoundPlan
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import TRAINING, Evaluation, Work
from tests.federation.fleet import campaign_plan

from .page_device import (
    PageDevice,
    plain_blob,
    shortened,
    vector_of_columns,
    vector_of_metrics,
)
from .simulator import Simulation, make_plan, names, seeded_bytes

TOLD = {"epochs": 2, "loss": "mse", "lr": 0.1, "proximal_mu": 0.0, "shuffle": True}
"""Names on both sides of those of a private update, with values of every type."""

MEASURE = Evaluation(metrics=("auc", "loss", "mae"), clip=2.0)
ASK = Question(
    parts=(
        Part(column="load", low=0.0, high=1.0, edges=(0.0, 0.5, 1.0)),
        Part(column="heat", low=-50.0, high=150.0),
    )
)

PRIVACY = {"epsilon": 50.0, "delta": 1e-5, "noise_multiplier": 1.0, "max_norm": 4.0}
FOLLOWS = {"max_norm": 1.8, "noise_multiplier": 0.3, "quantile": 0.5, "quantile_rate": 0.2}
"""What makes the bound follow the updates, about half of which are longer, in so small a cohort."""

KINDS: dict[str, tuple[dict[str, object], Work]] = {
    "training": ({}, TRAINING),
    "rotated": ({"rotate": True}, TRAINING),
    "evaluation": ({}, MEASURE),
    "question": ({}, ASK),
    "personal": ({"personal": ("head.*", "norm")}, TRAINING),
    "evaluation of own heads": ({"personal": ("head.*", "norm")}, MEASURE),
    "scaffold": ({"scaffold": True}, TRAINING),
    "evaluation beside control variates": ({"scaffold": True}, MEASURE),
    "private": ({"privacy": pb.Privacy(**PRIVACY)}, TRAINING),
    "private on devices": ({"privacy": pb.Privacy(**PRIVACY, distributed=True)}, TRAINING),
    "private by a bound that follows": (
        {"privacy": pb.Privacy(**PRIVACY | FOLLOWS)},
        TRAINING,
    ),
    "private on devices by such a bound": (
        {"privacy": pb.Privacy(**PRIVACY | FOLLOWS, distributed=True)},
        TRAINING,
    ),
}


def order_of(kind: str, num_values: int = 37) -> tuple[RoundPlan, pb.RoundInvite]:
    """Let a coordinator order a round; gives its own plan, and what a device gets to read."""
    changes, work = KINDS[kind]
    asks = isinstance(work, Question)
    campaign = Campaign(
        campaign_id="c0ffee",
        plan=campaign_plan(cohort=8, min_cohort=8, **changes),
        model_digest=b"" if asks else bytes(range(32)),
    )
    order = campaign.next_order(
        names(8),
        num_values,
        {} if asks else TOLD,
        work=work,
        round_id=bytes(range(16)).hex(),
    )
    assert isinstance(order.plan, RoundPlan)
    sent = wire.invite_to_wire(order).SerializeToString()
    return order.plan, pb.RoundInvite.FromString(sent)


def invite_of(plan: RoundPlan) -> pb.RoundInvite:
    """Invite to a round of usual training with some numbers."""
    return pb.RoundInvite(
        round_id=plan.round_id.hex(),
        plan=wire.plan_to_wire(plan),
        model_digest=bytes(32),
        training=wire.config_to_wire(TOLD),
    )


class InvitedSimulation(Simulation):
    """A round of devices that were invited; some are of the other implementation."""

    def __init__(self, invite: pb.RoundInvite, *others: str, **how: object) -> None:
        plan = wire.plan_of_invite(invite)
        assert isinstance(plan, RoundPlan)
        super().__init__(plan, **how)
        self.encoding = wire.encoding_of_invite(invite)
        self.weights = {name: min(w, plan.max_weight) for name, w in self.weights.items()}
        for name in others:
            draw = seeded_bytes((self.seed, name))
            self.sessions[name] = PageDevice(invite, self.signers[name], draw)

    def masked(self, name: str) -> bytes:
        """Let a device make its update private, if the round asks for that, and mask it."""
        session = self.sessions[name]
        if self.encoding is None or isinstance(session, PageDevice):
            return super().masked(name)
        handed = self.inbox(name), self.deltas[name], self.weights[name]
        return session.mask(*handed, self.encoding.encode)

    def draw_updates(self, size: float) -> None:
        """Give all devices updates of a normal distribution."""
        rng = np.random.default_rng(0)
        shape = self.plan.num_values - (self.encoding.num_bits if self.encoding else 0)
        self.deltas = {n: (size * rng.standard_normal(shape)).astype(np.float32) for n in self.ids}


STAGES = ("adverts", "shares", "uploads", "confirmations", "reveals")
PAGE = ("device-02", "device-05")


@pytest.mark.parametrize("kind", KINDS)
def test_it_names_every_kind_of_round_alike(kind: str):
    """Coordinator and both devices come to one digest of the plan, each from what it was asked."""
    plan, invite = order_of(kind)
    simulation = InvitedSimulation(invite, "device-02")
    assert simulation.sessions["device-02"].digest == plan.digest
    assert simulation.plan.digest == plan.digest
    digests = {order_of(other)[0].context_digest for other in KINDS}
    # A rotation is in the plan's digest itself, not in what the round is about.
    assert len(digests) == len(KINDS) - 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rotated"])
def test_every_byte_is_the_same_in_every_kind(kind: str):
    """From the same randomness it sends what the product's device sends, whatever is asked."""
    _, invite = order_of(kind)
    simulations = InvitedSimulation(invite), InvitedSimulation(invite, *PAGE)
    for simulation in simulations:
        simulation.draw_updates(0.3)
        simulation.run()
    for name in STAGES:
        ours, theirs = (getattr(simulation, name) for simulation in simulations)
        if name == "uploads" and invite.private_update.variance:
            # How noise is made of random bytes is each device's own affair.
            ours, theirs = ({n: u for n, u in x.items() if n not in PAGE} for x in (ours, theirs))
        assert theirs == ours, name


PLANS = {
    "usual": make_plan(),
    "sparse": make_plan(12, num_neighbours=6, threshold=4),
    "two blocks": make_plan(num_values=70),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_byte_is_the_same(plan: RoundPlan):
    """The same over other graphs and lengths."""
    invite = invite_of(plan)
    ours, theirs = InvitedSimulation(invite), InvitedSimulation(invite, *PAGE)
    ours.run()
    theirs.run()
    for name in STAGES:
        assert getattr(theirs, name) == getattr(ours, name), name


def test_losses_between_both_kinds():
    """Whichever kind is lost, the other's shares take its masks off: the mean is exact."""
    lost = {"device-01": Step.MASK, "device-02": Step.MASK, "device-04": Step.CONFIRM}
    others = "device-02", "device-03", "device-04"
    simulation = InvitedSimulation(invite_of(make_plan()), *others, lost_before=lost)
    result = simulation.run()
    assert simulation.survivors == [n for n in simulation.ids if n not in list(lost)[:2]]
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())


def test_it_rotates_alike():
    """A rotated sum over both kinds is the mean, within a level of each device in each block."""
    plan = make_plan(num_values=70, rotate=True, clip=8.0)
    simulation = InvitedSimulation(invite_of(plan), "device-00", "device-06")
    simulation.draw_updates(1.0)
    result = simulation.run()
    weights = [simulation.weights[name] for name in simulation.ids]
    mean = np.average(list(simulation.deltas.values()), axis=0, weights=weights)
    step = plan.clip / plan.max_level * plan.max_weight / sum(weights)
    assert np.abs(result.mean_delta - mean).max() < 8 * 8 * step


def test_its_noise_is_as_strong():
    """Of zeros from four devices of either kind the sum is noise of eight shares' variance."""
    plan, invite = order_of("private on devices", num_values=500)
    simulation = InvitedSimulation(invite, *names(8)[:4])
    simulation.draw_updates(0.0)
    mean, num_devices = simulation.run().mean_delta, len(simulation.ids)
    levels = mean.astype(np.float64) * num_devices * plan.max_level / plan.clip
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-2)
    variance = num_devices * invite.private_update.variance
    deviation = variance * math.sqrt(2 / levels.size)  # of a sample's variance
    assert abs(np.square(levels).mean() - variance) < 5 * deviation
    assert abs(levels.mean()) < 5 * math.sqrt(variance / levels.size)


def test_it_measures_and_counts_alike():
    """What it tells of metrics and of columns is what the product's device tells."""
    _, invite = order_of("evaluation")
    measured = {"auc": 0.75, "loss": 17.0, "mae": math.inf, "other": 1.0}
    np.testing.assert_array_equal(
        np.array(vector_of_metrics(invite.evaluation, measured), np.float32),
        MEASURE.vector_of(measured),
    )
    _, invite = order_of("question")
    columns = {
        "load": [0.0, 0.5, 0.49, 1.0, 7.0, -3.0, math.nan],
        "heat": [20.0, math.nan, -90.0, 151.0, 37.5, 21.0, 22.0],
    }
    ours, num_rows = ASK.answer({name: np.array(values) for name, values in columns.items()})
    np.testing.assert_allclose(vector_of_columns(invite.question, columns), ours, rtol=1e-6)
    assert num_rows == 7


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_its_plain_updates_are_the_same(size: float):
    """The blob of a plain update, and how it is shortened where updates are private."""
    update = (size * np.random.default_rng(0).standard_normal(50)).astype(np.float32)
    assert plain_blob(update.tolist()) == bytes(update_to_bytes(update))
    mine = np.array(shortened(update.tolist(), 4.0), np.float32)
    np.testing.assert_allclose(mine, clip_length(update, 4.0)[0], rtol=1e-6)
    assert np.linalg.norm(mine.astype(np.float64)) <= 4.0
