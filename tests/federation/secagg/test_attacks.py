"""Attacks on a device, as data: what is done to what it is handed, and how it answers.

The victim is device-00 of 8; the threshold is 4.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import pytest

from minga.federation.secagg import agreement, signing
from minga.federation.secagg.device import DeviceSession, Step
from minga.federation.secagg.errors import (
    EquivocationError,
    MessageError,
    QuorumError,
    SignatureError,
)
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare

from .simulator import Signer, Simulation, make_plan, names, seeded_bytes

VICTIM, PEER, OTHER = "device-00", "device-01", "device-02"
EVIL = agreement.generate(seeded_bytes("evil"))
SMALL_ORDER = bytes(32)


Handed = TypeVar("Handed")


@dataclass(frozen=True)
class Attack(Generic[Handed]):
    """One attack: how the messages handed to the victim are changed, and what it answers."""

    name: str
    change: Callable[[Simulation, list[Handed]], list[Handed]]
    error: type[Exception]
    reason: str


def all_ids(attacks: list[Attack[Any]]) -> list[str]:
    return [attack.name for attack in attacks]


# -- keys -------------------------------------------------------------------------------------


def with_first(**changes: bytes | str) -> Callable[[Simulation, list[Advert]], list[Advert]]:
    """Change fields of the first advert, without being able to sign it."""
    return lambda _, adverts: [replace(adverts[0], **changes), *adverts[1:]]


def signed(
    mask_key: Callable[[Simulation], bytes], share_key: Callable[[Simulation], bytes]
) -> Callable[[Simulation, list[Advert]], list[Advert]]:
    """Let the first peer, who is in league, sign an advert with these keys."""

    def change(simulation: Simulation, adverts: list[Advert]) -> list[Advert]:
        advert = signing.sign_advert(
            simulation.plan,
            simulation.signers[PEER],
            mask_key(simulation),
            share_key(simulation),
            adverts[0].self_seed_commitment,
        )
        return [advert, *adverts[1:]]

    return change


def foreign_identity(simulation: Simulation, adverts: list[Advert]) -> list[Advert]:
    stranger = Signer(PEER, "another federation")
    advert = signing.sign_advert(
        simulation.plan, stranger, EVIL.public, EVIL.public, adverts[0].self_seed_commitment
    )
    return [advert, *adverts[1:]]


def other_round(simulation: Simulation, adverts: list[Advert]) -> list[Advert]:
    plan = replace(simulation.plan, round_id=b"yesterday's one.")
    return [Simulation(plan).until(Step.ADVERTISE).adverts[PEER], *adverts[1:]]


def other_model(simulation: Simulation, adverts: list[Advert]) -> list[Advert]:
    plan = replace(simulation.plan, context_digest=b"z" * 32)
    return [Simulation(plan).until(Step.ADVERTISE).adverts[PEER], *adverts[1:]]


KEY_ATTACKS: list[Attack[Advert]] = [
    Attack("man in the middle of masks", with_first(mask_key=EVIL.public), SignatureError, PEER),
    Attack("man in the middle of shares", with_first(share_key=EVIL.public), SignatureError, PEER),
    Attack("other seed", with_first(self_seed_commitment=bytes(32)), SignatureError, PEER),
    Attack("unsigned", with_first(signature=b""), SignatureError, PEER),
    Attack("another's signature", with_first(device_id="stranger"), SignatureError, "stranger"),
    Attack(
        "another's certificate",
        lambda sim, adverts: [
            replace(adverts[0], certificate=sim.signers[OTHER].certificate_der),
            *adverts[1:],
        ],
        SignatureError,
        PEER,
    ),
    Attack("foreign identity", foreign_identity, SignatureError, "certificate is not of"),
    Attack("replay from another round", other_round, SignatureError, PEER),
    Attack("peer with another model", other_model, SignatureError, PEER),
    Attack("doubled peer", lambda _, adverts: [*adverts, adverts[0]], MessageError, "came twice"),
    Attack(
        "itself as a peer",
        lambda sim, adverts: [sim.adverts[VICTIM], *adverts[1:]],
        MessageError,
        "itself as a neighbour",
    ),
    Attack(
        "reflected mask key",
        signed(lambda sim: sim.adverts[VICTIM].mask_key, lambda _: EVIL.public),
        MessageError,
        "advertised the keys of device-00",
    ),
    Attack(
        "reflected share key, crosswise",
        signed(lambda sim: sim.adverts[VICTIM].share_key, lambda _: EVIL.public),
        MessageError,
        "advertised the keys of device-00",
    ),
    Attack(
        "share key of small order",
        signed(lambda _: EVIL.public, lambda _: SMALL_ORDER),
        MessageError,
        "small order",
    ),
    Attack("too few peers", lambda _, adverts: adverts[:3], QuorumError, "4 are needed"),
    Attack("no peers", lambda _, adverts: [], QuorumError, "4 are needed"),
]


@pytest.mark.parametrize("attack", KEY_ATTACKS, ids=all_ids(KEY_ATTACKS))
def test_attacks_on_keys(attack: Attack[Advert]):
    """No secret is shared with keys that their owner did not sign for this very plan."""
    simulation = Simulation().until(Step.ADVERTISE)
    session = simulation.sessions[VICTIM]
    with pytest.raises(attack.error, match=attack.reason):
        session.share(attack.change(simulation, simulation.adverts_for(VICTIM)))
    assert session.step is Step.ADVERTISE
    assert len(session.share(simulation.adverts_for(VICTIM))) == 7


def test_more_neighbours_than_the_plan_has():
    """A neighbourhood padded with more devices than agreed is refused."""
    simulation = Simulation(make_plan(12, num_neighbours=6)).until(Step.ADVERTISE)
    everyone = [simulation.adverts[name] for name in names(12) if name != VICTIM]
    with pytest.raises(MessageError, match="11 neighbours were named, the plan has 6"):
        simulation.sessions[VICTIM].share(everyone)


def test_a_mask_key_of_small_order_costs_the_upload_alone():
    """A signed mask key that would make a mask public stops the device before it uploads."""
    simulation = Simulation().until(Step.ADVERTISE)
    change = signed(lambda _: SMALL_ORDER, lambda sim: sim.adverts[PEER].share_key)
    simulation.adverts[PEER] = change(simulation, [simulation.adverts[PEER]])[0]
    simulation.share()
    with pytest.raises(MessageError, match="small order") as caught:
        simulation.masked(VICTIM)
    assert caught.value.blamed == (PEER,)


# -- shares -----------------------------------------------------------------------------------

SHARE_ATTACKS: list[Attack[EncryptedShare]] = [
    Attack("doubled", lambda _, inbox: [*inbox, inbox[0]], MessageError, "came twice"),
    Attack(
        "for another device",
        lambda sim, inbox: [sim.shares[PEER][1], *inbox[1:]],
        MessageError,
        "shares for device-02 came to device-00",
    ),
    Attack(
        "from a stranger",
        lambda _, inbox: [replace(inbox[0], sender="stranger"), *inbox[1:]],
        MessageError,
        "stranger, which is no neighbour",
    ),
    Attack("too few", lambda _, inbox: inbox[:3], QuorumError, "3 neighbours shared"),
    Attack("none", lambda _, inbox: [], QuorumError, "0 neighbours shared"),
]


@pytest.mark.parametrize("attack", SHARE_ATTACKS, ids=all_ids(SHARE_ATTACKS))
def test_attacks_on_shares(attack: Attack[EncryptedShare]):
    """Nothing is uploaded unless enough true neighbours shared their secrets."""
    simulation = Simulation().until(Step.SHARE)
    session = simulation.sessions[VICTIM]
    inbox = attack.change(simulation, simulation.inbox(VICTIM))
    with pytest.raises(attack.error, match=attack.reason):
        session.mask(inbox, simulation.deltas[VICTIM], simulation.weights[VICTIM])
    assert session.step is Step.SHARE


# -- survivors --------------------------------------------------------------------------------

LIST_ATTACKS: list[Attack[str]] = [
    Attack("doubled", lambda _, names_: [*names_, PEER], MessageError, "7 different ones"),
    Attack("without the victim", lambda _, names_: names_[1:], MessageError, "leaves out"),
    Attack(
        "with a device that never shared",
        lambda _, names_: [*names_, "device-07"],
        MessageError,
        "never shared",
    ),
    Attack(
        "more than the cohort",
        lambda _, names_: [*names_, "x", "y"],
        MessageError,
        "at most 8",
    ),
    Attack(
        "too few neighbours", lambda _, names_: names_[:4], QuorumError, "3 neighbours survived"
    ),
    Attack(
        "padded with strangers",
        lambda _, names_: [*names_[:4], "x", "y"],
        QuorumError,
        "3 neighbours survived",
    ),
    Attack("the victim alone", lambda _, names_: [VICTIM], QuorumError, "0 neighbours survived"),
]


@pytest.mark.parametrize("attack", LIST_ATTACKS, ids=all_ids(LIST_ATTACKS))
def test_attacks_on_the_list_of_survivors(attack: Attack[str]):
    """A list under which the victim would not be well hidden is not signed."""
    simulation = Simulation(lost_before={"device-07": Step.SHARE}).until(Step.MASK)
    session = simulation.sessions[VICTIM]
    with pytest.raises(attack.error, match=attack.reason):
        session.confirm(attack.change(simulation, simulation.survivors))
    assert session.step is Step.MASK


# -- confirmations ----------------------------------------------------------------------------


def forged(count: int) -> Callable[[Simulation, list[Confirmation]], list[Confirmation]]:
    """Spoil the signatures of the first few."""
    return lambda _, given: [
        replace(one, signature=one.signature[::-1]) if place < count else one
        for place, one in enumerate(given)
    ]


def of_other_list(simulation: Simulation, given: list[Confirmation]) -> list[Confirmation]:
    shorter = simulation.survivors[:-1]
    return [
        signing.sign_survivors(simulation.plan, simulation.signers[one.device_id], shorter)
        for one in given
    ]


def of_other_round(simulation: Simulation, given: list[Confirmation]) -> list[Confirmation]:
    plan = replace(simulation.plan, round_id=b"yesterday's one.")
    return [
        signing.sign_survivors(plan, simulation.signers[one.device_id], simulation.survivors)
        for one in given
    ]


def renamed(simulation: Simulation, given: list[Confirmation]) -> list[Confirmation]:
    """Pass one device's true signature off as everybody's."""
    return [replace(given[0], device_id=one.device_id) for one in given]


CONFIRMATION_ATTACKS: list[Attack[Confirmation]] = [
    Attack("forged", forged(4), SignatureError, "3 neighbours signed"),
    Attack("of another list", of_other_list, SignatureError, "0 neighbours signed"),
    Attack("of another round", of_other_round, SignatureError, "0 neighbours signed"),
    Attack("one for all", renamed, SignatureError, "1 neighbours signed"),
    Attack("too few", lambda _, given: given[:3], QuorumError, "3 neighbours confirmed"),
    Attack("doubled", lambda _, given: [*given[:3], given[0]], MessageError, "came twice"),
    Attack(
        "the victim's own",
        lambda sim, given: [*given[:3], sim.confirmations[VICTIM]],
        MessageError,
        "no surviving neighbours",
    ),
]


@pytest.mark.parametrize("attack", CONFIRMATION_ATTACKS, ids=all_ids(CONFIRMATION_ATTACKS))
def test_attacks_on_confirmations(attack: Attack[Confirmation]):
    """No share is revealed before enough neighbours signed the victim's own list."""
    simulation = Simulation().until(Step.CONFIRM)
    session = simulation.sessions[VICTIM]
    with pytest.raises(attack.error, match=attack.reason):
        session.reveal(attack.change(simulation, simulation.confirmations_for(VICTIM)))
    assert session.step is Step.CONFIRM


def test_a_few_forged_confirmations_do_not_stop_a_round():
    """While enough neighbours signed rightly, the others' bad signatures cost nothing."""
    simulation = Simulation().until(Step.CONFIRM)
    given = forged(3)(simulation, simulation.confirmations_for(VICTIM))
    assert len(simulation.sessions[VICTIM].reveal(given).self_seed_shares) == 7


def test_two_lists_of_survivors():
    """A coordinator that tells each half of the cohort another list gets shares from nobody."""
    simulation = Simulation().until(Step.MASK)
    halves = names(8)[:4], names(8)[4:]
    lists = simulation.survivors, [n for n in simulation.survivors if n != VICTIM]
    with pytest.raises(MessageError, match="leaves out"):
        simulation.sessions[VICTIM].confirm(lists[1])
    for half, survivors in zip(halves, lists, strict=True):
        for name in half:
            simulation.confirmations[name] = simulation.sessions[name].confirm(survivors)
    for name in names(8):
        given = [c for c in simulation.confirmations_for(name) if c.device_id != VICTIM]
        with pytest.raises(SignatureError):
            simulation.sessions[name].reveal(given)
        own_half = next(half for half in halves if name in half)
        matching = [c for c in given if c.device_id in own_half]
        with pytest.raises(QuorumError):
            simulation.sessions[name].reveal(matching)


# -- uploads ----------------------------------------------------------------------------------


def test_a_truncated_upload_is_left_out():
    """A cut upload is refused; without its sender the round is exact all the same."""
    simulation = Simulation().until(Step.MASK)
    simulation.uploads[PEER] = simulation.uploads[PEER][:-1]
    with pytest.raises(MessageError, match="bytes, expected"):
        simulation.unmask()
    del simulation.uploads[PEER]
    result = simulation.confirm().reveal().unmask()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())


# -- both secrets -----------------------------------------------------------------------------


def ask_for_both(session: DeviceSession, survivors: list[str]) -> None:
    """Ask once more, as if the victim had vanished."""
    session.confirm([name for name in survivors if name != VICTIM])


def test_both_secrets_of_one_device():
    """Asked for a survivor's seed and then for its mask key, nobody gives the second."""
    simulation = Simulation().until(Step.REVEAL)
    for name in names(8)[1:]:
        session = simulation.sessions[name]
        with pytest.raises(EquivocationError, match="another list of survivors"):
            ask_for_both(session, simulation.survivors)
        again = session.reveal(simulation.confirmations_for(name))
        assert VICTIM in again.self_seed_shares
        assert VICTIM not in again.mask_key_shares


def test_both_secrets_of_a_lost_device():
    """A device that was declared lost keeps its seed, even if its upload turns up late."""
    simulation = Simulation(lost_before={VICTIM: Step.MASK}).until(Step.REVEAL)
    late = simulation.masked(VICTIM)
    assert len(late) == simulation.plan.upload_size
    for name in simulation.survivors:
        with pytest.raises(EquivocationError, match="another list of survivors"):
            simulation.sessions[name].confirm([*simulation.survivors, VICTIM])
        reveal = simulation.sessions[name].reveal(simulation.confirmations_for(name))
        assert VICTIM in reveal.mask_key_shares
        assert VICTIM not in reveal.self_seed_shares
