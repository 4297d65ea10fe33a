"""Taking masks off a sum: threads of the coordinator against actors on Ray.

As many masks as a round of 32 or 256 devices without losses leaves, over models of several sizes.
Both do the same work with the same code; Ray adds the way there and back. On one machine that
cannot pay: the table tells how much it costs, and from which size on a cluster with more cores
than this machine would win, if Ray's overhead stayed what it is.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from harness import (
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)

from minga.cluster.unmasking import ray_unmasking
from minga.federation.secagg.masking import (
    MASK_KEY_BYTES,
    ApplyMasks,
    Mask,
    apply_masks_threaded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How much is to be taken off."""

    num_values: int
    num_masks: int


FULL: Final = tuple(
    Case(num_values=num_values, num_masks=num_masks)
    for num_values in (1_000_000, 10_000_000, 40_000_000)
    for num_masks in (32, 256)
)
QUICK: Final = (
    Case(num_values=100_000, num_masks=32),
    Case(num_values=1_000_000, num_masks=32),
    Case(num_values=1_000_000, num_masks=256),
)
NUM_REPEATS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds of every run."""

    case: Case
    threads_s: tuple[float, ...]
    ray_s: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        """Give the median of each."""
        return statistics.median(self.threads_s), statistics.median(self.ray_s)

    @property
    def overhead_s(self) -> float:
        """Say what Ray costs beside the work, which takes as many cores here as threads do."""
        threads_s, ray_s = self.medians
        return max(0.0, ray_s - threads_s)


def measure(case: Case, on_ray: ApplyMasks) -> Result:
    """Run both in turn, and compare every bit.

    Raises:
        AssertionError: they differ.
    """
    masks = [Mask(key=os.urandom(MASK_KEY_BYTES), sign=-1) for _ in range(case.num_masks)]
    threads_s, ray_s = [], []
    for _ in range(NUM_REPEATS):
        one, other = (np.zeros(case.num_values, np.uint32) for _ in range(2))
        threads_s.append(_timed(apply_masks_threaded, one, masks))
        ray_s.append(_timed(on_ray, other, masks))
        assert np.array_equal(one, other)
    print(".", end="", file=sys.stderr, flush=True)
    return Result(case=case, threads_s=tuple(threads_s), ray_s=tuple(ray_s))


def _timed(apply: ApplyMasks, values: Any, masks: Sequence[Mask]) -> float:
    start = time.perf_counter()
    apply(values, masks)
    return time.perf_counter() - start


def print_results(results: Sequence[Result]) -> None:
    """Print a row for each case."""
    rows = []
    for result in results:
        threads_s, ray_s = result.medians
        # With c times the cores the work takes threads_s / c; the overhead stays.
        gain = threads_s / (threads_s / 8 + result.overhead_s)
        rows.append(
            [
                f"{result.case.num_values:,} values",
                f"{result.case.num_masks} masks",
                f"{1e3 * threads_s:.1f}",
                f"{1e3 * ray_s:.1f}",
                f"{threads_s / ray_s:.2f}x",
                f"{1e3 * result.overhead_s:.1f}",
                f"{gain:.1f}x",
            ]
        )
    cores = os.cpu_count()
    columns = ("vector", "sum", f"threads ms ({cores} cores)", f"Ray ms ({cores} actors)")
    print_table(
        "Unmasking, medians",
        (*columns, "threads/Ray", "overhead ms", "8 times the cores: speed-up"),
        rows,
    )
    print(
        "The last column is computed, not measured: the work divided by eight, plus the overhead."
    )


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    under = conditions(["cryptography", "numpy", "ray"])
    with ending_cleanly(), ray_unmasking(os.cpu_count()) as on_ray:
        print_conditions(under)
        on_ray(np.zeros(1, np.uint32), [])  # the actors are up
        results = [measure(case, on_ray) for case in (QUICK if options.quick else FULL)]
    print(file=sys.stderr)
    print_results(results)
    report = {
        "benchmark": "unmasking",
        "quick": options.quick,
        "conditions": under,
        "cases": [asdict(result) for result in results],
    }
    largest_s, on_ray_s = results[-1].medians
    target = Target(name="unmasking.ray_to_threads", value=on_ray_s / largest_s, goal="<=2")
    conclude(report, [target], options.json)


if __name__ == "__main__":
    main()
