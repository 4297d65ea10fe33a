"""Unmasking in spite of liars."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.secagg import agreement, signing
from minga.federation.secagg.device import Step
from minga.federation.secagg.errors import QuorumError, ShareError, SumError
from minga.federation.secagg.messages import Reveal

from .simulator import Simulation, make_plan, names, seeded_bytes

LOST = "device-07"


def lying(reveal: Reveal, about: set[str] | None = None) -> Reveal:
    """Replace shares by other field elements: all of them, or those of some peers."""
    draw = seeded_bytes(reveal.device_id)

    def false(shares):
        return {
            peer: b"\0" + draw(32) if about is None or peer in about else share
            for peer, share in shares.items()
        }

    return replace(
        reveal,
        self_seed_shares=false(reveal.self_seed_shares),
        mask_key_shares=false(reveal.mask_key_shares),
    )


def revealed(num_devices: int = 8) -> Simulation:
    lost = {names(num_devices)[-1]: Step.MASK}
    return Simulation(make_plan(num_devices), lost_before=lost).until(Step.REVEAL)


@pytest.mark.parametrize("liar", names(7))
def test_a_liar_is_left_out_and_named(liar: str):
    """One device that reveals nothing but lies changes nothing but its reputation.

    Four shares are used, those of the first names; a liar among the others does not matter.
    """
    simulation = revealed()
    simulation.reveals[liar] = lying(simulation.reveals[liar])
    result = simulation.unmask()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())
    assert result.liars == ((liar,) if liar in names(5) else ())


@pytest.mark.parametrize("about", ["device-03", LOST])
def test_a_single_lie_is_found(about: str):
    """A device that lies about one peer alone is found out, be it a seed or a mask key."""
    simulation = revealed()
    simulation.reveals["device-00"] = lying(simulation.reveals["device-00"], {about})
    result = simulation.unmask()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())
    assert result.liars == ("device-00",)


@settings(max_examples=20)
@given(liars=st.sets(st.sampled_from(names(11)), max_size=4))
def test_liars_are_borne_while_enough_are_honest(liars: set[str]):
    """With a threshold of six among eleven, up to four liars in a neighbourhood are left out."""
    simulation = revealed(12)
    for liar in liars:
        simulation.reveals[liar] = lying(simulation.reveals[liar])
    result = simulation.unmask()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())
    assert set(result.liars) <= liars


def test_too_many_liars_stop_the_round():
    """Where fewer than the threshold are honest the sum is not given out wrong: it is not given."""
    simulation = revealed()
    for liar in names(4):
        simulation.reveals[liar] = lying(simulation.reveals[liar])
    with pytest.raises(ShareError, match="do not rebuild what it advertised"):
        simulation.unmask()


@pytest.mark.parametrize("owner", ["device-02", LOST])
def test_false_secrets_are_blamed_on_their_owner(owner: str):
    """A device that shares other secrets than it advertised is named, survivor or lost."""
    simulation = Simulation(lost_before={LOST: Step.MASK}).until(Step.ADVERTISE)
    true = simulation.adverts[owner]
    other = agreement.generate(seeded_bytes("other")).public
    simulation.adverts[owner] = signing.sign_advert(
        simulation.plan, simulation.signers[owner], other, true.share_key, bytes(32)
    )
    simulation.share().mask().confirm().reveal()
    with pytest.raises(ShareError, match=f"of {owner} do not rebuild") as caught:
        simulation.unmask()
    assert caught.value.blamed == (owner,)


@pytest.mark.parametrize("num_spoilt", [1, 2, 3])
def test_tampered_ciphertexts_cost_their_shares_alone(num_spoilt: int):
    """Shares that cannot be decrypted are left out; while enough are left the sum is exact."""
    simulation = Simulation().until(Step.SHARE)
    owner = "device-01"
    simulation.shares[owner] = tuple(
        replace(share, ciphertext=bytes(94)) if place < num_spoilt else share
        for place, share in enumerate(simulation.shares[owner])
    )
    simulation.mask().confirm().reveal()
    silent = [share.receiver for share in simulation.shares[owner][:num_spoilt]]
    assert [n for n in names(8) if owner not in simulation.reveals[n].self_seed_shares] == sorted(
        [owner, *silent]
    )
    result = simulation.unmask()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())
    assert result.liars == ()


def test_too_many_tampered_ciphertexts_stop_the_round():
    """With fewer readable shares than the threshold the sum cannot be unmasked."""
    simulation = Simulation().until(Step.SHARE)
    simulation.shares["device-01"] = tuple(
        replace(share, ciphertext=bytes(94)) for share in simulation.shares["device-01"]
    )
    simulation.mask().confirm().reveal()
    with pytest.raises(QuorumError, match="0 shares of the self-mask seed of device-01"):
        simulation.unmask()


def test_an_upload_of_other_bytes_is_noticed():
    """An upload that is no masked update makes the sum undecodable instead of wrong."""
    simulation = Simulation().until(Step.MASK)
    simulation.uploads["device-01"] = bytes(simulation.plan.upload_size)
    simulation.confirm().reveal()
    with pytest.raises(SumError, match="no honestly encoded update"):
        simulation.unmask()
