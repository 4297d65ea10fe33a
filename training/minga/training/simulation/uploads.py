"""A round's updates in memory, as the coordinator's arithmetic reads them."""

from collections.abc import Mapping

import numpy as np

from minga.federation.aggregation.contributions import VectorContribution
from minga.federation.coordinator.rounds import PlainRound, SecureRound
from minga.federation.secagg.coordinator import Unmasked
from minga.federation.secagg.fixedpoint import decode_sum
from minga.training.simulation.fleet import Upload


class HeldUploads:
    """Updates that are held in memory; those of a secure round are levels without masks.

    Masks are drawn so that they cancel in the sum, so the sum is the same without them.
    """

    def __init__(self, uploads: Mapping[str, Upload]) -> None:
        self._uploads = uploads
        self.liars: tuple[str, ...] = ()
        """Nobody lies here about shares that nobody makes."""

    def contributions(self, round_: PlainRound) -> list[VectorContribution]:
        """Give the updates of a plain round."""
        return [
            VectorContribution(
                name=name,
                values=self._uploads[name].values,
                weight=self._uploads[name].weight,
                factor=round_.factor_of(name),
            )
            for name in round_.survivors
        ]

    def unmasked_sum(self, round_: SecureRound, group: tuple[str, ...]) -> Unmasked:
        """Add the levels of one group.

        Raises:
            SumError: more came together than the round's numbers hold, as it would in earnest.
        """
        survivors = [name for name in group if name in round_.updates]
        total = np.zeros(round_.plan.vector_length, np.uint32)
        for name in survivors:
            total += self._uploads[name].values.view(np.uint32)
        mean, weight = decode_sum(round_.plan, total, len(survivors))
        return Unmasked(mean_delta=mean, total_weight=weight, liars=())
