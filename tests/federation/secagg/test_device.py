"""A device's session: the order of its steps, and what it answers when asked again."""

from collections.abc import Callable

import numpy as np
import pytest

from minga.federation.secagg.device import DeviceSession, Step
from minga.federation.secagg.errors import (
    EquivocationError,
    PlanError,
    QuorumError,
    StateError,
    UpdateError,
)

from .simulator import Simulation, make_plan, names

ME = "device-00"


def test_steps_are_taken_in_order():
    """Each step leads to the next one."""
    simulation = Simulation()
    session = simulation.sessions[ME]
    assert session.step is Step.NONE
    for step in (Step.ADVERTISE, Step.SHARE, Step.MASK, Step.CONFIRM, Step.REVEAL):
        getattr(simulation, step.name.lower())()
        assert session.step is step


CALLS: dict[Step, Callable[[Simulation, DeviceSession], object]] = {
    Step.SHARE: lambda sim, session: session.share(sim.adverts_for(ME)),
    Step.MASK: lambda sim, session: session.mask(sim.inbox(ME), sim.deltas[ME], sim.weights[ME]),
    Step.CONFIRM: lambda sim, session: session.confirm(sim.survivors),
    Step.REVEAL: lambda sim, session: session.reveal(sim.confirmations_for(ME)),
}


@pytest.mark.parametrize(
    ("last", "step"), [(last, step) for step in CALLS for last in Step if last < step - 1]
)
def test_steps_out_of_order_are_our_own_mistake(last: Step, step: Step):
    """A step that comes too early is a StateError; the session stays where it was."""
    done = Simulation().until(Step.REVEAL)
    late = Simulation().until(last).sessions[ME]
    with pytest.raises(StateError, match=f"this step follows {Step(step - 1).name.lower()}"):
        CALLS[step](done, late)
    assert late.step is last


@pytest.mark.parametrize("last", [step for step in Step if step is not Step.NONE])
def test_asked_again_alike_it_answers_alike(last: Step):
    """A coordinator that was restarted gets the same bytes for the same question, at any time."""
    simulation = Simulation().until(last)
    session = simulation.sessions[ME]
    assert session.advertise() == simulation.adverts[ME]
    if last >= Step.SHARE:
        assert session.share(reversed(simulation.adverts_for(ME))) == simulation.shares[ME]
    if last >= Step.MASK:
        assert simulation.masked(ME) == simulation.uploads[ME]
    if last >= Step.CONFIRM:
        assert session.confirm(reversed(simulation.survivors)) == simulation.confirmations[ME]
    if last >= Step.REVEAL:
        some = simulation.confirmations_for(ME)[:5]
        assert session.reveal(some) == simulation.reveals[ME]
    assert session.step is last


@pytest.mark.parametrize("last", [Step.SHARE, Step.MASK, Step.CONFIRM, Step.REVEAL])
def test_asked_again_differently_it_refuses(last: Step):
    """A question that was answered is not answered again with other words in it."""
    simulation = Simulation().until(last)
    session = simulation.sessions[ME]
    with pytest.raises(EquivocationError, match="other neighbours"):
        session.share(simulation.adverts_for(ME)[1:])
    if last >= Step.MASK:
        with pytest.raises(EquivocationError, match="other shares"):
            session.mask(simulation.inbox(ME)[1:], simulation.deltas[ME], simulation.weights[ME])
    if last >= Step.CONFIRM:
        with pytest.raises(EquivocationError, match="another list of survivors"):
            session.confirm(simulation.survivors[:-1])


@pytest.mark.parametrize("other_weight", [False, True])
def test_one_mask_never_covers_two_updates(other_weight: bool):
    """A second update under the same masks would show the difference of both: it is refused."""
    simulation = Simulation().until(Step.MASK)
    delta, weight = simulation.deltas[ME], simulation.weights[ME]
    if other_weight:
        weight = weight % 16 + 1
    else:
        delta = delta + np.float32(1)
    with pytest.raises(StateError, match="another update"):
        simulation.sessions[ME].mask(simulation.inbox(ME), delta, weight)


def test_a_refused_update_can_be_made_good():
    """An update that cannot be encoded changes nothing: the next one is masked."""
    simulation = Simulation().until(Step.SHARE)
    session, inbox = simulation.sessions[ME], simulation.inbox(ME)
    with pytest.raises(UpdateError):
        session.mask(inbox, np.full(37, np.nan, np.float32), 1)
    assert session.step is Step.SHARE
    assert len(session.mask(inbox, simulation.deltas[ME], 1)) == simulation.plan.upload_size


def test_a_site_may_ask_for_company():
    """A site's own floor refuses plans that may end in a sum over fewer updates."""
    simulation = Simulation(make_plan(8, threshold=5))
    parts = (simulation.plan, simulation.signers[ME], simulation.registry)
    assert DeviceSession(*parts, min_summed=6).step is Step.NONE
    with pytest.raises(PlanError, match="as few as 6 updates; this site wants 7"):
        DeviceSession(*parts, min_summed=7)


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.CONFIRM, Step.REVEAL])
def test_below_the_threshold_a_device_stops(step: Step):
    """With one neighbour fewer than the threshold nothing more leaves the device."""
    lost = dict.fromkeys(names(8)[4:], Step(step - 1))
    simulation = Simulation(lost_before=lost).until(Step(step - 1))
    with pytest.raises(QuorumError, match=r"3 neighbours .*, 4 are needed"):
        CALLS[step](simulation, simulation.sessions[ME])
    assert simulation.sessions[ME].step is Step(step - 1)


def test_sessions_of_one_plan_share_nothing():
    """A device that restarts takes fresh keys even for the same plan."""
    simulation = Simulation()
    parts = (simulation.plan, simulation.signers[ME], simulation.registry)
    first, second = (DeviceSession(*parts).advertise() for _ in range(2))
    assert first.mask_key != second.mask_key
    assert first.share_key != second.share_key
    assert first.self_seed_commitment != second.self_seed_commitment
