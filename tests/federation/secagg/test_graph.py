"""The masking graph."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.federation.secagg.graph import neighbours

from .simulator import names


@given(
    num_devices=st.integers(1, 60),
    half=st.integers(1, 15),
    seed=st.binary(max_size=16),
)
def test_graph_is_regular_and_symmetric(num_devices: int, half: int, seed: bytes):
    """Everyone has the same number of neighbours, is theirs in turn, and is not its own."""
    ids = names(num_devices)
    graph = neighbours(ids, 2 * half, seed)
    degree = min(2 * half, num_devices - 1)
    assert sorted(graph) == sorted(ids)
    for name, peers in graph.items():
        assert len(set(peers)) == len(peers) == degree
        assert name not in peers
        assert peers == tuple(sorted(peers))
        assert all(name in graph[peer] for peer in peers)


def test_graph_follows_from_the_seed_alone():
    """The same seed gives the same graph in any order of the cohort; another seed another one."""
    ids = names(40)
    graph = neighbours(ids, 6, b"seed")
    assert neighbours(reversed(ids), 6, b"seed") == graph
    assert neighbours(ids, 6, b"other") != graph


def test_graph_is_connected():
    """From one device all the others can be reached."""
    graph = neighbours(names(50), 2, b"seed")
    reached, edge = set(), {"device-00"}
    while edge:
        reached |= edge
        edge = {peer for name in edge for peer in graph[name]} - reached
    assert len(reached) == 50


def test_impossible_graphs_are_refused():
    """A doubled device and an odd degree are the caller's mistakes."""
    with pytest.raises(ValueError, match="twice"):
        neighbours(["a", "a", "b"], 2, b"")
    with pytest.raises(ValueError, match="num_neighbours is 3"):
        neighbours(names(8), 3, b"")
