"""How many neighbours a device masks with, and how many of them rebuild a secret."""

import math
from dataclasses import dataclass
from typing import Final

from minga.federation.secagg.errors import PlanError

MIN_COHORT: Final = 3
"""With two devices each learns the other's update from the sum."""

COMPLETE_UP_TO: Final = 32
"""A cohort so small masks everyone with everyone: that takes a device milliseconds."""

SECURITY_BITS: Final = 40
"""A random graph fails to hide an update with probability at most 2**-40."""

CORRECTNESS_BITS: Final = 20
"""A round that loses no more devices than expected fails with probability at most 2**-20."""

SHARE_SLACK: Final = 1e-9
"""A share of a cohort may be off by so many devices: 1 - (1 - 0.1) of forty is a bit less than the
four that are meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhood:
    """Degree of the masking graph and threshold of the secret sharing."""

    num_neighbours: int
    threshold: int


def choose_neighbourhood(
    cohort_size: int, expected_dropout: float, colluder_share: float
) -> Neighbourhood:
    """Choose the smallest neighbourhood that bears the losses and colluders expected.

    A device with k neighbours, c of which show the coordinator everything, is safe if `2t > k + c`:
    each of the k - c honest ones reveals a share of one of its two secrets only, the colluders
    reveal both, and both secrets take 2t shares. (Bonawitz et al., section 6, have this for the
    complete graph.) The round succeeds if t neighbours stay to the end.

    For a random ring lattice (`graph.neighbours`) with n devices, of which at most d drop out and c
    collude, k is the smallest even number for which a t exists such that (Bell et al., section 3:
    the properties of a good graph, here with the exact tails instead of their bounds)

    - the honest survivors stay connected: cutting the ring takes k/2 lost or colluding devices in
      a row at two places, so `n (n-k-1)/2 * C(n-k, b-k) / C(n, b)` with b = c + d bounds it;
    - no device has more than q colluding neighbours, hypergeometric, and `t = (k + q) // 2 + 1`;
    - every device keeps t neighbours, hypergeometric,

    the first two except with probability 2**-41 each, the third with 2**-20, over all devices.
    Cohorts up to `COMPLETE_UP_TO`, and those without such a k below n - 1, get the complete graph:
    the counts are then exact, not random, and losses beyond the expected ones hurt least.

    Args:
        cohort_size: Devices in the round.
        expected_dropout: Share of them that may vanish after the shares were sent.
        colluder_share: Share of them that may pool what they see with the coordinator.

    Raises:
        PlanError: the cohort is too small to bear both.
    """
    _check(cohort_size, expected_dropout, colluder_share)
    num_dropouts = math.floor(expected_dropout * cohort_size + SHARE_SLACK)
    num_colluders = math.ceil(colluder_share * cohort_size)
    first = 2 if cohort_size > COMPLETE_UP_TO else cohort_size
    for degree in range(first, cohort_size - 1, 2):
        if _log2_cut(cohort_size, degree, num_dropouts + num_colluders) > -(SECURITY_BITS + 1):
            continue
        worst = _most(cohort_size, num_colluders, degree, bits=SECURITY_BITS + 1)
        lost = _most(cohort_size, num_dropouts, degree, bits=CORRECTNESS_BITS)
        threshold = (degree + worst) // 2 + 1
        if threshold <= degree - lost:
            return Neighbourhood(num_neighbours=degree, threshold=threshold)
    return _complete(cohort_size, num_dropouts, num_colluders)


def _check(cohort_size: int, expected_dropout: float, colluder_share: float) -> None:
    if cohort_size < MIN_COHORT:
        raise PlanError(f"the cohort has {cohort_size} devices; invite {MIN_COHORT} or more")
    for name, share in (("expected_dropout", expected_dropout), ("colluder_share", colluder_share)):
        if not 0 <= share < 1:
            raise PlanError(f"{name} is {share}; give a share from 0 to below 1")


def _complete(cohort_size: int, num_dropouts: int, num_colluders: int) -> Neighbourhood:
    degree = cohort_size - 1
    threshold = (degree + num_colluders) // 2 + 1
    if threshold > degree - num_dropouts:
        raise PlanError(
            f"{cohort_size} devices cannot bear {num_colluders} colluding and {num_dropouts} "
            "vanishing ones; invite more, or expect less (expected_dropout, colluder_share)"
        )
    return Neighbourhood(num_neighbours=degree, threshold=threshold)


def _log2_cut(cohort_size: int, degree: int, num_bad: int) -> float:
    """Bound the probability that `num_bad` random devices cut the ring lattice, as log2."""
    if num_bad < degree:
        return -math.inf
    pairs_of_gaps = math.log2(cohort_size) + math.log2(cohort_size - degree - 1) - 1
    all_bad = _log2_choose(cohort_size - degree, num_bad - degree)
    return pairs_of_gaps + all_bad - _log2_choose(cohort_size, num_bad)


def _most(cohort_size: int, num_marked: int, degree: int, *, bits: int) -> int:
    """Say how many marked neighbours no device exceeds, except with probability 2**-bits.

    A device's neighbours are `degree` draws without replacement from the other devices.
    """
    others = cohort_size - 1
    num_marked = min(num_marked, others)
    allowed = 2.0**-bits / cohort_size
    most = min(degree, num_marked)
    tail = 0.0
    while most >= 0:
        tail += _hypergeometric(others, num_marked, degree, most)
        if tail > allowed:
            return most
        most -= 1
    return 0


def _hypergeometric(population: int, marked: int, draws: int, hits: int) -> float:
    """Give the probability of exactly `hits` marked ones among `draws` without replacement."""
    if draws - hits > population - marked:
        return 0.0
    log2 = (
        _log2_choose(marked, hits)
        + _log2_choose(population - marked, draws - hits)
        - _log2_choose(population, draws)
    )
    return math.exp2(log2)


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
