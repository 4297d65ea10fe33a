"""Successive halving whose cuts do not depend on which trial was faster.

At rungs of 1, 2, 4, ... epochs a trial is cut if it is worse there than the best share of the
trials before it (ASHA's stopping rule; Li et al., "A system for massively parallel hyperparameter
tuning", MLSys 2020). ASHA compares with whoever has reached the rung by then, so with several
trials at a time the same seed may cut others. Here a trial is compared with the trials of lower
number, whenever those get there. It runs on until their values are known, and what it did beyond
its cut does not count. So any number of trials at a time gives what one at a time gives.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minga.training.space import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Halving:
    """The rule; `cuts` is all of it.

    Attributes:
        objective: what is compared.
        grace_epochs: the first rung.
        reduction_factor: of so many trials one goes on, and the rungs' ratio.
        max_epochs: of a trial that is never cut.
    """

    objective: Objective
    grace_epochs: int
    reduction_factor: int
    max_epochs: int

    @property
    def rungs(self) -> list[int]:
        """The epochs after which trials are compared."""
        rungs = []
        rung = self.grace_epochs
        while rung < self.max_epochs:
            rungs.append(rung)
            rung *= self.reduction_factor
        return rungs

    def cuts(self, values: Mapping[int, Sequence[float]], ended: Collection[int]) -> dict[int, int]:
        """Give the trials that are cut, and after how many epochs; one that may yet be is missing.

        Args:
            values: number -> the objective after each epoch so far; numbers are those of all
                trials that have begun, from 1 on.
            ended: numbers of the trials that will report nothing more.
        """
        rungs = self.rungs
        seen: dict[int, list[float]] = {rung: [] for rung in rungs}
        # At these rungs it is known of all trials so far whether and how they got there.
        certain = set(rungs)
        cut: dict[int, int] = {}
        for number in sorted(values):
            for rung in rungs:
                if len(values[number]) < rung:
                    if number not in ended:
                        certain -= {later for later in rungs if later >= rung}
                    break
                value = self._finite(values[number][rung - 1])
                is_cut = rung in certain and self._is_worse(value, seen[rung])
                seen[rung].append(value)
                if is_cut:
                    cut[number] = rung
                    break
                if rung not in certain:
                    certain -= {later for later in rungs if later > rung}
                    break
        return cut

    def _finite(self, value: float) -> float:
        return value if np.isfinite(value) else self.objective.worst

    def _is_worse(self, value: float, others: Sequence[float]) -> bool:
        if not others:
            return False
        share = 1 / self.reduction_factor
        best_share = 1 - share if self.objective.mode == "max" else share
        return self.objective.gain(value, float(np.quantile(others, best_share))) < 0
