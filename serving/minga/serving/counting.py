"""Adds up what replicas count, of which each knows its own part, and some die."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from minga.inference.tally import Tally

Counts = Mapping[str, Mapping[str, Tally]]
"""What was counted, by comparison and role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCounts:
    """What one replica has counted since its comparisons began.

    Attributes:
        replica: names it, and no other one, nor its successor.
        counts: what it counted.
    """

    replica: str
    counts: Counts


class CountBook:
    """Keeps the last that each replica told: one that died told it for the last time."""

    def __init__(self) -> None:
        self._told: dict[str, dict[str, Mapping[str, Tally]]] = {}

    def update(self, told: Iterable[ReplicaCounts]) -> None:
        """Hear what the living replicas count."""
        for each in told:
            for comparison, roles in each.counts.items():
                self._told.setdefault(comparison, {})[each.replica] = roles

    def keep(self, comparisons: Collection[str]) -> None:
        """Forget all other comparisons."""
        self._told = {name: told for name, told in self._told.items() if name in comparisons}

    def total(self) -> Counts:
        """Give the sums over all replicas, living and dead."""
        return {
            comparison: {
                role: Tally.sum([roles[role] for roles in told.values()])
                for role in ("baseline", "challenger")
            }
            for comparison, told in self._told.items()
        }
