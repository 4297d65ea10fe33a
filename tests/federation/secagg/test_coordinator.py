"""The masked sum, and the coordinator's checks on shares and reveals."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.federation.secagg.coordinator import MaskedSum, check_reveal, check_shares, unmask
from minga.federation.secagg.device import Step
from minga.federation.secagg.errors import MessageError, QuorumError, StateError
from minga.federation.secagg.messages import Reveal
from minga.federation.secagg.packing import pack

from .simulator import Simulation, make_plan, names

PLAN = make_plan(num_values=100)


def upload(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 2**32, PLAN.vector_length, dtype=np.uint32)
    return pack(values, PLAN.ring_bits)


@given(cuts=st.lists(st.integers(0, PLAN.upload_size), max_size=6))
def test_pieces_of_any_size_add_like_the_whole(cuts: list[int]):
    """However an upload is cut up on its way, the sum is the same."""
    data = upload(0)
    places = [0, *sorted(cuts), len(data)]
    pieces = [data[low:high] for low, high in pairwise(places)]
    whole, chunked = MaskedSum(PLAN), MaskedSum(PLAN)
    whole.add(data)
    chunked.add_chunks(pieces)
    assert chunked.num_updates == 1
    np.testing.assert_array_equal(chunked.take(), whole.take())


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [upload(1)[:-1]],
        [upload(1), b"\0"],
        [upload(1)[:50], upload(1)[50:], upload(1)],
        [upload(1)[:-1], bytes([upload(1)[-1] | 0x80])],
    ],
    ids=["nothing", "truncated", "too long", "twice", "padding"],
)
def test_a_bad_upload_leaves_the_sum_alone(pieces: list[bytes]):
    """A truncated, lengthened or wrongly padded upload adds nothing and is not counted."""
    clean, total = MaskedSum(PLAN), MaskedSum(PLAN)
    for sum_ in (clean, total):
        sum_.add(upload(0))
    with pytest.raises(MessageError):
        total.add_chunks(pieces)
    assert total.num_updates == 1
    np.testing.assert_array_equal(total.take(), clean.take())


def test_a_sum_is_taken_once():
    """Once its masks may be off, nothing is added to a sum or unmasked again."""
    total = MaskedSum(PLAN)
    total.take()
    with pytest.raises(StateError, match="taken already"):
        total.take()
    with pytest.raises(StateError, match="taken already"):
        total.add(upload(0))


def unmask_with(simulation: Simulation, total: MaskedSum, **changes: object):
    return unmask(
        **{
            "plan": simulation.plan,
            "graph": simulation.graph,
            "adverts": simulation.adverts,
            "sharers": simulation.sharers,
            "survivors": simulation.survivors,
            "reveals": simulation.reveals,
            "masked_sum": total,
            **changes,
        }
    )


def test_the_sum_must_be_that_of_the_survivors():
    """A sum of another round or another number of updates is not unmasked."""
    simulation = Simulation().until(Step.REVEAL)
    total = MaskedSum(simulation.plan)
    for data in list(simulation.uploads.values())[1:]:
        total.add(data)
    with pytest.raises(StateError, match="holds 7 updates"):
        unmask_with(simulation, total)
    with pytest.raises(StateError, match="of its round"):
        unmask_with(simulation, MaskedSum(PLAN), survivors=[])
    total.add(next(iter(simulation.uploads.values())))
    with pytest.raises(StateError, match="never shared"):
        unmask_with(simulation, total, sharers=simulation.sharers[1:])
    assert unmask_with(simulation, total).total_weight == simulation.true_weight()


def test_too_few_survivors_are_not_unmasked():
    """A sum over no more than the threshold cannot and must not be unmasked."""
    simulation = Simulation(lost_before=dict.fromkeys(names(8)[:4], Step.MASK)).until(Step.MASK)
    assert not simulation.can_unmask()
    with pytest.raises(QuorumError, match="4 updates are in the sum, 5 are needed"):
        simulation.unmask()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda shares: shares[1:],
        lambda shares: (*shares[1:], shares[1]),
        lambda shares: (*shares[1:], replace(shares[0], receiver="stranger")),
        lambda shares: (*shares[1:], replace(shares[0], sender="device-05")),
        lambda _: (),
    ],
    ids=["missing", "doubled", "stranger", "other sender", "none"],
)
def test_shares_are_for_exactly_the_neighbours(spoil):
    """A sender that leaves out, doubles or invents a neighbour is refused and named."""
    simulation = Simulation().until(Step.SHARE)
    sender = "device-03"
    with pytest.raises(MessageError, match="exactly its neighbours") as caught:
        check_shares(simulation.graph, sender, spoil(simulation.shares[sender]))
    assert caught.value.blamed == (sender,)


@pytest.mark.parametrize(
    ("seeds", "keys"),
    [
        (["device-01"], []),  # dropped: its self-mask seed must stay hidden
        ([], ["device-02"]),  # survived: its mask key must stay hidden
        (["stranger"], []),
        ([], ["device-00"]),  # itself
    ],
)
def test_shares_that_nobody_asked_for_are_refused(seeds: list[str], keys: list[str]):
    """The coordinator takes only the shares that the list of survivors calls for."""
    simulation = Simulation(lost_before={"device-01": Step.MASK}).until(Step.MASK)
    share = bytes(33)
    reveal = Reveal(
        device_id="device-00",
        self_seed_shares=dict.fromkeys(seeds, share),
        mask_key_shares=dict.fromkeys(keys, share),
    )
    with pytest.raises(MessageError, match="nobody asked for"):
        check_reveal(simulation.graph, simulation.sharers, simulation.survivors, reveal)
