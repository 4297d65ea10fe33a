"""Plans: what they refuse, what their digest binds, how neighbourhoods are sized."""

import math
from dataclasses import fields, replace
from fractions import Fraction

import pytest

from minga.federation.secagg.errors import PlanError
from minga.federation.secagg.plan import RoundPlan, context_digest, derive_plan
from minga.federation.secagg.sizing import COMPLETE_UP_TO, choose_neighbourhood

from .simulator import make_plan

DERIVED = {
    "round_id": bytes(16),
    "context_digest": bytes(32),
    "num_values": 1000,
    "clip": 4.0,
    "value_bits": 20,
    "max_weight": 16_384,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"round_id": b"short"}, "round_id has 5 bytes; give 16"),
        ({"context_digest": b""}, "context_digest has 0 bytes"),
        ({"num_values": 0}, "num_values is 0"),
        ({"max_cohort": 2, "num_neighbours": 1, "threshold": 1}, "hides an update among 3"),
        ({"num_neighbours": 5}, "num_neighbours is 5; give an even number"),
        ({"num_neighbours": 8}, "num_neighbours is 8"),
        ({"num_neighbours": 0}, "num_neighbours is 0"),
        ({"threshold": 3}, "more than half of the 7"),
        ({"num_neighbours": 6, "threshold": 3}, "more than half of the 6"),
        ({"threshold": 8}, "at most all of them"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"clip": math.inf}, "clip is inf"),
        ({"value_bits": 30}, "a sum over 8 devices takes 33 bits"),
        ({"value_bits": 1}, "give at least 2"),
        ({"max_weight": 0}, "between 1 and 524287"),
        ({"max_weight": 2**19}, "between 1 and 524287"),
    ],
)
def test_unsafe_plans_are_refused(change: dict[str, object], reason: str):
    """A plan that cannot work, or would betray a device, says what is wrong with it."""
    with pytest.raises(PlanError, match=reason):
        make_plan(**change)


@pytest.mark.parametrize(
    ("cohort", "bits"), [(3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (1024, 10), (1025, 11)]
)
def test_ring_holds_the_largest_sum(cohort: int, bits: int):
    """The ring has exactly the bits that the largest sum of the largest cohort takes."""
    plan = make_plan(cohort, num_neighbours=2)
    assert plan.ring_bits == plan.value_bits + bits
    assert cohort * plan.max_level < 2 ** (plan.ring_bits - 1)


def test_digest_binds_every_field():
    """Two plans that differ anywhere have different digests."""
    plan = make_plan(8, num_neighbours=6, threshold=4)
    changes = {
        "round_id": b"x" * 16,
        "context_digest": b"x" * 32,
        "num_values": 38,
        "max_cohort": 9,
        "num_neighbours": 4,
        "threshold": 5,
        "value_bits": 21,
        "clip": 1.0,
        "max_weight": 17,
        "rotate": True,
    }
    assert changes.keys() == {field.name for field in fields(RoundPlan)}
    changes["num_neighbours"] = 7  # 4 would not go with the threshold
    digests = {replace(plan, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {plan.digest}) == len(changes) + 1


def test_context_tells_configurations_apart():
    """Another model, name, value or type of a value is another context; order is not."""
    base = context_digest(b"m" * 32, {"lr": 0.1, "epochs": 1})
    others = [
        context_digest(b"n" * 32, {"lr": 0.1, "epochs": 1}),
        context_digest(b"m" * 32, {"lr": 0.2, "epochs": 1}),
        context_digest(b"m" * 32, {"lr": 0.1, "epochs": True}),
        context_digest(b"m" * 32, {"lr": 0.1, "epochs": 1.0}),
        context_digest(b"m" * 32, {"lr": 0.1, "epochs": "1"}),
        context_digest(b"m" * 32, {"lr": 0.1}),
        context_digest(b"m" * 32, {"lrepochs": 0.1}),
    ]
    assert len({base, *others}) == len(others) + 1
    assert context_digest(b"m" * 32, {"epochs": 1, "lr": 0.1}) == base


@pytest.mark.parametrize("cohort", [3, 4, 5, 8, 13, 32])
def test_small_cohorts_get_the_complete_graph(cohort: int):
    """In a small cohort everyone masks with everyone, and nothing depends on a drawn graph."""
    plan = derive_plan(cohort_size=cohort, **DERIVED)
    colluders, dropouts = math.ceil(0.1 * cohort), math.floor(0.2 * cohort)
    assert plan.num_neighbours == cohort - 1
    assert 2 * plan.threshold > plan.num_neighbours + colluders
    assert plan.threshold <= plan.num_neighbours - dropouts


@pytest.mark.parametrize("cohort", [33, 100, 1000, 4096])
@pytest.mark.parametrize(("dropout", "colluders"), [(0.2, 0.1), (0.05, 0.01), (0.0, 0.0)])
def test_sparse_graphs_meet_their_bounds(cohort: int, dropout: float, colluders: float):
    """The chosen degree and threshold keep all three failures as rare as promised."""
    chosen = choose_neighbourhood(cohort, dropout, colluders)
    degree, threshold = chosen.num_neighbours, chosen.threshold
    assert degree % 2 == 0 or degree == cohort - 1
    bad, lost = math.ceil(colluders * cohort), math.floor(dropout * cohort)

    def tail(marked: int, more_than: int) -> Fraction:
        """Give P(a device has more than so many marked neighbours), exactly."""
        hits = range(more_than + 1, min(marked, degree) + 1)
        ways = sum(math.comb(marked, h) * math.comb(cohort - 1 - marked, degree - h) for h in hits)
        return Fraction(ways, math.comb(cohort - 1, degree))

    # Both secrets leak from `2 * threshold - degree` colluding neighbours on.
    assert cohort * tail(bad, 2 * threshold - degree - 1) <= Fraction(1, 2**41)
    assert cohort * tail(lost, degree - threshold) <= Fraction(1, 2**20)
    assert degree < cohort - 1 or cohort <= 2 * COMPLETE_UP_TO


def test_degree_grows_slower_than_the_cohort():
    """Ten times the devices do not mean ten times the neighbours: that is what the graph is for."""
    degrees = [choose_neighbourhood(n, 0.2, 0.1).num_neighbours for n in (100, 1000, 10_000)]
    assert degrees == sorted(degrees)
    assert degrees[2] < 6 * degrees[0]


@pytest.mark.parametrize(
    ("cohort", "dropout", "colluders", "reason"),
    [
        (2, 0.0, 0.0, "the cohort has 2 devices; invite 3 or more"),
        (4, 0.3, 0.1, "4 devices cannot bear 1 colluding and 1 vanishing"),
        (100, 0.45, 0.3, "100 devices cannot bear"),
        (8, 1.0, 0.0, "expected_dropout is 1.0"),
        (8, 0.2, -0.1, "colluder_share is -0.1"),
    ],
)
def test_impossible_sizes_are_refused(cohort: int, dropout: float, colluders: float, reason: str):
    """A cohort that cannot bear what is expected of it is refused with a remedy."""
    with pytest.raises(PlanError, match=reason):
        choose_neighbourhood(cohort, dropout, colluders)
