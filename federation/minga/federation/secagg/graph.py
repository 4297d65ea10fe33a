"""Who masks with whom: a ring lattice over a random order of the cohort (Bell et al., 2020)."""

from collections.abc import Iterable
from hashlib import sha256
from itertools import pairwise

from minga.federation.secagg.encoding import encode


def groups(cohort_ids: Iterable[str], num_groups: int, seed: bytes) -> tuple[tuple[str, ...], ...]:
    """Draw groups whose sizes differ by one at most: arcs of a ring in an order drawn at random.

    Args:
        cohort_ids: The devices.
        num_groups: How many groups, 1 or more.
        seed: Any bytes; the same seed gives the same groups on every machine.

    Returns:
        The members of each group, sorted.
    """
    ring = _ring(cohort_ids, seed)
    ends = [len(ring) * place // num_groups for place in range(num_groups + 1)]
    return tuple(tuple(sorted(ring[low:high])) for low, high in pairwise(ends))


def neighbours(
    cohort_ids: Iterable[str], num_neighbours: int, seed: bytes
) -> dict[str, tuple[str, ...]]:
    """Draw the masking graph.

    Devices stand on a ring in an order drawn from the seed; each is joined to the
    `num_neighbours / 2` next on either side (a Harary graph). Where that would go around the ring,
    everyone is joined to everyone.

    Args:
        cohort_ids: The devices.
        num_neighbours: Degree, even unless the graph is complete.
        seed: Any bytes; the same seed gives the same graph on every machine.

    Returns:
        Device -> its neighbours, sorted. Symmetric, and nobody is its own neighbour.

    Raises:
        ValueError: a device is named twice, or the degree is odd in an incomplete graph.
    """
    ids = list(cohort_ids)
    if len(set(ids)) != len(ids):
        raise ValueError("a device is in the cohort twice")
    if num_neighbours >= len(ids) - 1:
        return {name: tuple(sorted(set(ids) - {name})) for name in ids}
    if num_neighbours % 2:
        raise ValueError(f"num_neighbours is {num_neighbours}; an incomplete graph needs it even")
    ring = _ring(ids, seed)
    steps = [step for reach in range(1, num_neighbours // 2 + 1) for step in (reach, -reach)]
    return {
        name: tuple(sorted(ring[(place + step) % len(ring)] for step in steps))
        for place, name in enumerate(ring)
    }


def _ring(ids: Iterable[str], seed: bytes) -> list[str]:
    """Put devices in an order that the seed draws."""
    return sorted(ids, key=lambda name: sha256(encode("ring", seed, name)).digest())
