"""Secure rounds in groups, and with more devices than they need."""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest

from minga.federation.coordinator import journal
from minga.federation.coordinator.rounds import Finish, Stage
from minga.federation.identity import Identity
from minga.federation.secagg.errors import QuorumError, StateError, SumError
from minga.federation.secagg.graph import groups
from tests.federation.coordinator.table import Table, expected_mean, make_identities, weight_of


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """Twelve devices of one authority."""
    return make_identities(tmp_path_factory.mktemp("authority"), 12)


def assert_exact(table: Table, group: Iterable[str]) -> None:
    """Check that a group's sum is that of its survivors alone."""
    counted = [name for name in group if name in table.round.updates]
    mean, weight = table.sum(group)
    assert weight == sum(map(weight_of, counted))
    # Another device in it would make 5e-3. A float32 is off its level by up to a thousandth, which
    # rounding turns into a whole one now and then.
    np.testing.assert_allclose(mean, expected_mean(counted), atol=1e-4)


def test_each_group_has_its_own_sum(identities: dict[str, Identity]) -> None:
    """Three groups of four: no device masks with another group's, and each sum is exact."""
    table = Table(identities, num_groups=3)
    table.play(Stage.AGGREGATE)
    drawn = table.round.groups
    assert [len(group) for group in drawn] == [4, 4, 4]
    assert sorted(name for group in drawn for name in group) == sorted(identities)
    for group in drawn:
        assert all(set(table.round.graph[name]) == set(group) - {name} for name in group)
        assert_exact(table, group)


def test_sum_across_groups_is_not_to_be_had(identities: dict[str, Identity]) -> None:
    """Members of two groups have no common sum: what each revealed fits its own group alone."""
    table = Table(identities, num_groups=3)
    table.play(Stage.AGGREGATE)
    first, second, _ = table.round.groups
    mixed = [*first[:2], second[0]]
    try:
        mean, _ = table.sum(mixed)
    except (StateError, QuorumError, SumError, KeyError):
        return
    assert not np.allclose(mean, expected_mean(mixed), atol=0.1)


def test_device_lost_within_a_group(identities: dict[str, Identity]) -> None:
    """A group that can bear it goes on without a member that vanished; the others do not notice."""
    table = Table(identities, num_groups=3)
    table.play(Stage.AGGREGATE, lambda now: ("site-4",) if now is Stage.UPDATES else ())
    assert len(table.round.groups) == 3
    assert set(identities) - set(table.round.survivors) == {"site-4"}
    for group in table.round.groups:
        assert_exact(table, group)


@pytest.mark.parametrize("stage", [Stage.SHARES, Stage.UPDATES])
def test_small_group_is_left_out(identities: dict[str, Identity], stage: Stage) -> None:
    """A group that lost too many is dropped whole; the round goes on with the others."""
    table = Table(identities, num_groups=3)
    table.play(Stage.SHARES)
    small = table.round.groups[0]
    table.play(Stage.AGGREGATE, lambda now: small[:2] if now is stage else ())
    assert table.round.stage is Stage.AGGREGATE, table.round.reason
    assert len(table.round.groups) == 2
    assert not set(small) & set(table.round.survivors)
    finish = table.round.instruction(small[3])
    assert isinstance(finish, Finish)
    assert finish.reason == "too few stayed in its group"
    for group in table.round.groups:
        assert_exact(table, group)
    rows = [journal.encode(table.order.round_id, event, 0.0) for event in table.log]
    assert journal.replay(table.order, 0.0, rows).survivors == table.round.survivors


def test_too_few_groups_abort(identities: dict[str, Identity]) -> None:
    """What is left over all groups must reach the minimum cohort."""
    table = Table(identities, min_cohort=12, num_groups=3)
    table.play(Stage.SHARES)
    lost = table.round.groups[0][:2]
    table.play(Stage.AGGREGATE, lambda now: lost if now is Stage.SHARES else ())
    assert table.round.stage is Stage.ABORTED
    assert "12 are needed" in table.round.reason


def test_over_selected_devices_are_unmasked(identities: dict[str, Identity]) -> None:
    """The round takes the nine fastest of twelve; the masks of the slow ones are taken off."""
    table = Table(identities, goal=9)
    table.play(Stage.UPDATES)
    for name in table.order.invited[:9]:
        event = table.answer(name)
        assert event is not None
        table.take(event)
    assert table.round.stage is Stage.CONFIRM
    for name in table.order.invited[9:]:
        finish = table.round.instruction(name)
        assert isinstance(finish, Finish)
        assert not finish.counted
    table.play(Stage.AGGREGATE)
    assert table.round.survivors == table.order.invited[:9]
    assert_exact(table, table.order.invited)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 7])
def test_groups_are_even_and_disjoint(num_groups: int) -> None:
    """Every device is in one group, and sizes differ by one at most."""
    names = [f"site-{index}" for index in range(23)]
    drawn = groups(names, num_groups, b"seed")
    assert sorted(name for group in drawn for name in group) == sorted(names)
    assert all(not set(a) & set(b) for a, b in combinations(drawn, 2))
    sizes = [len(group) for group in drawn]
    assert max(sizes) - min(sizes) <= 1
    assert drawn == groups(reversed(names), num_groups, b"seed")
    assert num_groups == 1 or drawn != groups(names, num_groups, b"other seed")
