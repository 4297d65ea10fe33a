"""Ways in which secure aggregation failed elsewhere, each as a test that it does not here."""

import gc
from types import FunctionType, ModuleType

import numpy as np
import pytest

from minga.federation.secagg import agreement
from minga.federation.secagg.device import Step
from minga.federation.secagg.errors import EquivocationError, SignatureError
from minga.federation.secagg.packing import unpack

from .simulator import Simulation, make_plan, names, seeded_bytes


def test_mask_keys_have_all_their_bits():
    """Keys that fold or encode a seed have few values and are guessed; here every bit is a coin.

    Over 1000 pairs each of the 128 bits is set half of the time, within five sigma.
    """
    simulation = Simulation(make_plan(46, num_neighbours=44)).until(Step.ADVERTISE)
    draw_of = {name: seeded_bytes((0, name)) for name in simulation.ids}
    pairs = {
        name: agreement.KeyPair.from_secret((draw(32), draw(32))[1])
        for name, draw in draw_of.items()
    }
    adverts = simulation.adverts
    keys = [
        agreement.pair_mask(simulation.plan, pairs[low], adverts[low], adverts[high]).key
        for place, low in enumerate(simulation.ids)
        for high in simulation.ids[:place]
    ]
    bits = np.unpackbits(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), axis=1)
    assert len(set(keys)) == len(keys) == 1035
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(len(keys)))


def test_masks_fill_the_whole_ring():
    """Masks that leave out a value, or cover few bits, show through; here every level occurs."""
    simulation = Simulation(make_plan(8, value_bits=5, clip=15.0, max_weight=8, num_values=40_000))
    for name in simulation.ids:
        simulation.deltas[name] = np.zeros(40_000, np.float32)
        simulation.weights[name] = 1
    upload = simulation.until(Step.MASK).uploads["device-00"]
    levels = unpack(upload, simulation.plan.vector_length, simulation.plan.ring_bits)
    assert np.unique(levels).size == 2**simulation.plan.ring_bits


def test_a_masked_update_looks_uniform():
    """The bytes of one upload spread evenly although the update is zero (chi-square, p = 1e-5)."""
    simulation = Simulation(make_plan(8, num_values=100_000))
    simulation.deltas = {n: np.zeros(100_000, np.float32) for n in simulation.ids}
    upload = simulation.until(Step.MASK).uploads["device-00"]
    counts = np.bincount(np.frombuffer(upload, np.uint8), minlength=256)
    expected = len(upload) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 355  # 255 degrees of freedom


def test_a_request_for_both_secrets_gets_one():
    """Whoever is asked for both secrets of a device gives one, however the lie is told.

    There is one list, and whoever is not on it is lost: a request cannot even say both. So the
    liar tells two: to one half of the neighbours the victim is alive, to the other it is lost.
    Nobody reveals on confirmations of another list than its own, and nobody confirms two. (Every
    other way: test_attacks, device/test_two_secrets.)
    """
    simulation = Simulation().until(Step.MASK)
    alive = names(8)
    lost = [name for name in alive if name != "device-00"]
    told = {name: alive if number % 2 else lost for number, name in enumerate(lost)}
    confirmations = {n: simulation.sessions[n].confirm(told[n]) for n in lost}
    for name, session in simulation.sessions.items():
        if name == "device-00":
            continue
        others = [confirmations[peer] for peer in lost if peer != name]
        with pytest.raises(SignatureError, match="signed the survivors that this device signed"):
            session.reveal(others)
        with pytest.raises(EquivocationError, match="another list of survivors"):
            session.confirm(lost if told[name] is alive else alive)


@pytest.mark.parametrize("step", [Step.ADVERTISE, Step.SHARE])
def test_a_device_lost_at_set_up_does_not_end_the_round(step: Step):
    """Losing a device while keys or shares are exchanged leaves the others' round intact."""
    simulation = Simulation(lost_before={"device-04": step})
    result = simulation.run()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())
    assert len(simulation.survivors) == 7


@pytest.mark.parametrize("num_neighbours", [2, 4, 6, 8, 9])
def test_even_and_odd_numbers_of_shares_work(num_neighbours: int):
    """Any allowed number of shares below or at the cohort's size gives an exact sum."""
    simulation = Simulation(make_plan(10, num_neighbours=num_neighbours))
    result = simulation.run()
    np.testing.assert_array_equal(result.mean_delta, simulation.true_mean())


def test_example_counts_stay_with_the_device():
    """Nothing but the masked update depends on a site's example count or update."""
    one, other = Simulation(), Simulation()
    other.weights = {name: 17 - weight for name, weight in one.weights.items()}
    other.deltas = {name: -delta for name, delta in one.deltas.items()}
    one.until(Step.REVEAL)
    other.until(Step.REVEAL)
    assert one.adverts == other.adverts
    assert one.shares == other.shares
    assert one.confirmations == other.confirmations
    assert one.reveals == other.reveals
    assert all(one.uploads[name] != other.uploads[name] for name in names(8))


def reachable_bytes(root: object) -> set[bytes]:
    """Collect all bytes that an object holds on to, directly or not."""
    found, seen, todo = set(), set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, FunctionType, ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, bytes):
            found.add(item)
        todo += gc.get_referents(item)
    return found


def test_secrets_are_dropped_as_soon_as_they_are_used():
    """A session holds its masking secrets until it uploads and its share key until it reveals."""
    simulation = Simulation().until(Step.ADVERTISE)
    draw = seeded_bytes((0, "device-00"))
    seed, mask_secret, share_secret = draw(32), draw(32), draw(32)
    session = simulation.sessions["device-00"]
    assert {seed, mask_secret, share_secret} <= reachable_bytes(session)
    simulation.share().mask()
    assert {seed, mask_secret, share_secret} & reachable_bytes(session) == {share_secret}
    simulation.confirm().reveal()
    assert not {seed, mask_secret, share_secret} & reachable_bytes(session)


def test_keys_made_by_the_coordinator_are_refused():
    """A coordinator that puts its own keys in place of everybody's learns no share."""
    simulation = Simulation().until(Step.ADVERTISE)
    own = Simulation(seed=1).until(Step.ADVERTISE)  # the same names, another authority
    for name in names(8):
        adverts = [own.adverts[peer] for peer in simulation.graph[name]]
        with pytest.raises(SignatureError, match="not signed by it"):
            simulation.sessions[name].share(adverts)


def test_an_upload_is_smaller_than_the_plain_update():
    """Masked values take as many bits as their sum needs, not eight bytes each."""
    simulation = Simulation(make_plan(8, num_values=10_000)).until(Step.MASK)
    plain_bytes = 4 * simulation.plan.num_values
    assert simulation.plan.upload_size < plain_bytes
    assert all(len(upload) == simulation.plan.upload_size for upload in simulation.uploads.values())
