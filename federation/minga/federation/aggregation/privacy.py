"""Differential privacy of devices: what bounds one device's influence, and what hides the rest.

A device's update is cut to a Euclidean length of `max_norm`, every device counts the same, and the
sum gets noise in proportion to that length. Who sees the result, and all later ones, can hardly
tell whether a device had sent its update or zeros. That is the neighbouring relation here; under it
the number of devices in a round, which the coordinator knows anyway, is no secret.

Two places for the noise:

- **central**: the coordinator adds a Gaussian to the mean (McMahan et al., ICLR 2018). It is
  trusted with the sum, and with plain rounds with every update. What it publishes is private.
- **distributed**: every device adds a share of the noise before its update is masked, so that the
  coordinator itself only ever learns a sum with noise in it. Shares are discrete Gaussians
  (Kairouz, Liu and Steinke, ICML 2021), added to the integers that are masked.

The other noise for masked integers is Skellam (Agarwal et al., NeurIPS 2021). Its sums are exactly
Skellam again, but its Poisson numbers have no sampler that is both exact and fast at the means
needed here; and what a sum of discrete Gaussians lacks of being one is counted (`distributed_rho`),
and below 1e-12 from `MIN_VARIANCE` on.

Rounding makes updates a little longer. `PrivateEncoding` bounds that too: whatever its coins say,
no update leaves it longer than `level_bound`.

A bound that follows the updates (`adaptive_clip`) takes one more thing from each device: whether
its update was within the bound. In secure rounds that is one more coordinate, plus or minus
`bit_level`, with the same noise as all others. Update and bit are one vector then, as long as the
two at right angles, and its sum is one mechanism: nothing is to be composed.
"""

from dataclasses import dataclass
from math import ceil, exp, floor, hypot, isfinite, pi, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.contributions import Vector
from minga.federation.aggregation.ledger import Budget, Concentrated, Gaussian, Mechanism
from minga.federation.aggregation.noise import MAX_VARIANCE, DiscreteNoise, RandomBytes
from minga.federation.errors import PrivacyError
from minga.federation.secagg.fixedpoint import encode_update
from minga.federation.secagg.masking import BLOCK_VALUES
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.sizing import SHARE_SLACK

Levels = NDArray[np.uint32]
"""Rounded values modulo 2**32."""

MIN_VARIANCE: Final = 4
"""Least variance of a device's share of the noise, in squared levels."""

_TAIL: Final = 8.0
"""Room for the noise of a sum, in standard deviations: a million coordinates all stay within it
except with a probability of 1e-9."""

_MOST_BITS: Final = 24
_LEAST_BITS: Final = 4

_ROUNDINGS: Final = 8
"""How often an update is rounded at random before its levels are cut towards zero instead."""

_MARGIN: Final = 4.0
"""sqrt(2 log(1 / beta)) of Kairouz, Liu and Steinke's conditional rounding: one rounding in 2,980,
beta, or fewer is too long and done again."""

_SLACK: Final = 1.0 + 2.0**-20
"""float32 may round a length up by this factor."""


def clip_length(update: Vector, max_norm: float) -> tuple[Vector, bool]:
    """Shorten an update to an Euclidean length, keeping its direction.

    Args:
        update: shape `(n,)`; not changed.
        max_norm: the length, above 0.

    Returns:
        The update, no longer than that; and whether it was within it before.

    Raises:
        PrivacyError: the update holds NaN or infinity, so that it has no length.
    """
    length = float(np.linalg.norm(update.astype(np.float64)))
    if not isfinite(length):
        raise PrivacyError("the update holds NaN or infinity; lower the training's learning rate")
    if length <= max_norm:
        return update, True
    return (update * (max_norm / (length * _SLACK))).astype(np.float32), False


def num_noisy(cohort_size: int, expected_dropout: float, colluder_share: float) -> int:
    """Say how many devices' shares of the noise are counted on.

    Of a cohort the expected share may vanish, whose noise is then not in the sum; and the share
    that may collude can tell the coordinator what it drew, or draw nothing. The noise of the others
    alone is as strong as asked for. So with everybody there and honest the sum has
    `cohort / num_noisy` times the variance.

    Raises:
        PrivacyError: nobody is left.
    """
    num_lost = floor(expected_dropout * cohort_size + SHARE_SLACK)
    num = cohort_size - num_lost - ceil(colluder_share * cohort_size)
    if num < 1:
        raise PrivacyError(
            f"of {cohort_size} devices none is counted on for noise; expect less "
            "(expected_dropout, colluder_share), or invite more"
        )
    return num


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """What a campaign asks for.

    Attributes:
        budget: what all rounds with the fleet may spend together.
        noise_multiplier: standard deviation of the noise on the sum over the longest update.
        max_norm: the longest update.
        is_distributed: whether devices add the noise.
        clip: how `max_norm` follows the updates after the first round; None: not at all.

    Raises:
        PrivacyError: a number is out of its range.
    """

    budget: Budget
    noise_multiplier: float
    max_norm: float
    is_distributed: bool
    clip: AdaptiveClip | None = None

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "max_norm"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise PrivacyError(f"{name} is {value:g}; it must be above 0 and finite")

    def planned(self) -> Mechanism:
        """Give what a round spends in which no more is lost than expected, at the most."""
        if self.is_distributed:
            return Concentrated(rho=1.0 / (2.0 * self.noise_multiplier**2))
        return Gaussian(noise_multiplier=self.noise_multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateEncoding:
    """How a device makes its update private before it is masked.

    Attributes:
        max_norm: the longest update, above 0, at most the plan's `clip`.
        variance: of this device's share of the noise, in squared levels; 0: none.
        bit_level: the size of one more coordinate, the last of the plan's `num_values`: above zero
            if the update was within `max_norm`, below if it had to be shortened. 0: there is none.

    Raises:
        PrivacyError: a number is out of its range.
    """

    max_norm: float
    variance: int = 0
    bit_level: int = 0

    def __post_init__(self) -> None:
        if not (self.max_norm > 0 and isfinite(self.max_norm)):
            raise PrivacyError(f"max_norm is {self.max_norm:g}; it must be above 0 and finite")
        if self.variance and not MIN_VARIANCE <= self.variance <= MAX_VARIANCE:
            raise PrivacyError(
                f"a device's noise has a variance of {self.variance} squared levels; it must be "
                f"from {MIN_VARIANCE} to {MAX_VARIANCE}, as `size_noise` chooses it"
            )
        if self.bit_level < 0:
            raise PrivacyError(f"bit_level is {self.bit_level}; it must be 0 or more")

    @property
    def num_bits(self) -> int:
        """Coordinates beside the update's: 1 for the bit, if it is asked for."""
        return 1 if self.bit_level else 0

    def share_within(self, plan: RoundPlan, mean_bit: float) -> float:
        """Read from the mean of a secure round the share of updates that were within the bound.

        Args:
            plan: the round's numbers.
            mean_bit: the last value of the mean.

        Returns:
            The share; with what noise and lies add, any number.
        """
        return 0.5 + 0.5 * mean_bit * plan.max_level / (plan.clip * self.bit_level)

    def encode(
        self, plan: RoundPlan, delta: Vector, weight: int, random_bytes: RandomBytes
    ) -> Levels:
        """Shorten, round and blur an update; takes the place of `fixedpoint.encode_update`.

        Args:
            plan: the round's numbers.
            delta: the update, float32, shape `(num_values - num_bits,)`.
            weight: must be the plan's `max_weight`: all devices count the same.
            random_bytes: source of randomness.

        Returns:
            Levels modulo 2**32, shape `(num_values + 1,)`; the last one is the weight, without
            noise: it is the same for all.

        Raises:
            UpdateError: see `encode_update`.
            PrivacyError: the plan is not one for private updates.
        """
        if plan.clip < self.max_norm or weight != plan.max_weight:
            raise PrivacyError(
                f"the plan clips at {plan.clip:g} and the update weighs {weight}; private updates "
                f"are up to {self.max_norm:g} long, and weigh {plan.max_weight} each"
            )
        if self.bit_level and (plan.rotate or self.bit_level > plan.max_level):
            raise PrivacyError(
                f"the bit of an update is {self.bit_level} levels, and the plan has up to "
                f"{plan.max_level}; the plan must hold it, and must not rotate it"
            )
        delta, is_within = clip_length(delta, self.max_norm)
        if self.bit_level:
            delta = np.append(delta, np.float32(0.0))  # stays 0 when it is rounded
        levels = self._rounded(plan, delta, random_bytes)
        if self.bit_level:
            levels[-2:-1].view(np.int32)[0] = self.bit_level if is_within else -self.bit_level
        if self.variance:
            noise = DiscreteNoise(self.variance, random_bytes).draw(levels.size - 1)
            # What is beyond the ring wraps around: that may spoil the sum, but not privacy.
            levels[:-1] += noise.astype(np.int32).view(np.uint32)
        return levels

    def _rounded(self, plan: RoundPlan, delta: Vector, random_bytes: RandomBytes) -> Levels:
        """Round at random until the levels are short enough, which nearly always is at once."""
        most = longest_levels(plan, self)
        for _ in range(_ROUNDINGS):
            levels = encode_update(plan, delta, plan.max_weight, random_bytes)
            if _length(levels[:-1].view(np.int32)) <= most:
                return levels
        # A level is less than 1 from what was rounded: one step towards zero makes it no longer.
        rounded = levels[:-1].view(np.int32)
        rounded -= np.sign(rounded)
        return levels


def norm_in_levels(plan: RoundPlan, max_norm: float) -> float:
    """Say how many levels long the longest update is, before it is rounded."""
    return plan.max_level * max_norm / plan.clip


def longest_levels(plan: RoundPlan, encoding: PrivateEncoding) -> float:
    """Bound the length of an update's levels in a round, without its bit."""
    num_values = plan.vector_length - 1 - encoding.num_bits
    return level_bound(norm_in_levels(plan, encoding.max_norm), num_values)


def sensitivity(plan: RoundPlan, encoding: PrivateEncoding) -> float:
    """Bound the length of what one device adds to a sum, its bit included; in levels."""
    return hypot(longest_levels(plan, encoding), encoding.bit_level)


def level_bound(norm: float, num_values: int) -> float:
    """Bound the length of a private update's levels (Kairouz, Liu and Steinke, algorithm 1).

    Rounding at random adds a quarter or less to the mean of each coordinate's square; never does it
    add more than 1 to its size.

    Args:
        norm: length of the longest update in levels.
        num_values: coordinates.
    """
    likely = norm**2 + num_values / 4 + _MARGIN * (norm + sqrt(num_values) / 2)
    return min(sqrt(likely), norm + sqrt(num_values))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSize:
    """Numbers of a round whose devices add noise."""

    value_bits: int
    clip: float
    """The plan's: `max_norm`, and room for the noise."""
    variance: int
    """Of one device's share of the noise, in squared levels."""
    bit_level: int = 0
    """Of a bound that follows the updates: see `PrivateEncoding`."""


def size_noise(
    *,
    noise_multiplier: float,
    max_norm: float,
    num_values: int,
    num_noisy: int,
    min_cohort: int,
    cohort: int,
    adaptive: AdaptiveClip | None = None,
) -> NoiseSize:
    """Choose the finest levels for which noise can be drawn, and how much each device draws.

    The ring gets no more room for the noise than it takes: uploads are as small as they can be. A
    bit beside the update gets so many levels that the noise of those counted on is `bit_noise` on
    the share of bits; with the others' there is less on the share, and more on the updates.

    Args:
        noise_multiplier: standard deviation of the whole noise over the longest update, with its
            bit if there is one.
        max_norm: the longest update.
        num_values: coordinates.
        num_noisy: how many devices' shares make up the noise (`num_noisy`).
        min_cohort: the fewest devices in a sum: their noise has the least room.
        cohort: the most.
        adaptive: how the bound follows the updates; None: it does not, and there is no bit.

    Raises:
        PrivacyError: the noise is too small against the levels, or too large for the ring; or the
            bits alone would tell more than the noise multiplier allows.
    """
    bit_length = 0.0 if adaptive is None else adaptive.bit_length(noise_multiplier, num_noisy)
    most_bits = min(_MOST_BITS, 32 - (cohort - 1).bit_length())
    for room in range(most_bits - 1):
        for value_bits in range(most_bits, _LEAST_BITS - 1, -1):
            max_level = (1 << (value_bits - 1)) - 1
            norm = max_level / (1 << room)
            longest = level_bound(norm, num_values)
            bit_level = 0 if adaptive is None else max(1, round(bit_length * longest))
            variance = ceil((noise_multiplier * hypot(longest, bit_level)) ** 2 / num_noisy)
            fits = max(norm, bit_level) + _TAIL * sqrt(variance / min_cohort) <= max_level
            if fits and MIN_VARIANCE <= variance <= MAX_VARIANCE:
                return NoiseSize(
                    value_bits=value_bits,
                    clip=max_norm * (1 << room),
                    variance=variance,
                    bit_level=bit_level,
                )
    raise PrivacyError(
        f"no levels suit a noise_multiplier of {noise_multiplier:g} with {num_values} values and "
        f"{num_noisy} devices that add noise; invite more devices, or change noise_multiplier"
    )


def distributed_rho(*, plan: RoundPlan, encoding: PrivateEncoding, num_honest: int) -> float:
    """Give what a sum spends: it is rho-concentrated differentially private (zCDP).

    Kairouz, Liu and Steinke, theorem 1: with n shares of variance s², vectors of a length up to D
    and d coordinates, rho is half the square of the smaller of

        sqrt(D² / (n s²) + t d / 2)   and   D / (sqrt(n) s) + t sqrt(d),

    where t = 10 (exp(-2 pi² s² 1/2) + exp(-2 pi² s² 2/3) + ... + exp(-2 pi² s² (n - 1)/n)).

    A bit beside the update is one of the coordinates, so D² is L² + b² for updates of a length up
    to L and a bit of plus or minus b. With s² n = S² that is b² / S² + L² / S² = z**-2, which is
    Andrew et al.'s sum (NeurIPS 2021, theorem 1): the noise on the sum of bits is S / (2 b), and
    that on the updates S / L times as long as they are.

    Args:
        plan: the round's numbers.
        encoding: what its devices add; with noise.
        num_honest: n, the devices in the sum that added their share and keep it to themselves.

    Raises:
        PrivacyError: nobody did.
    """
    if num_honest < 1:
        raise PrivacyError("no device in the sum is counted on for noise: it must not be published")
    num_values = plan.vector_length - 1
    variance = encoding.variance
    ratio = sensitivity(plan, encoding) / sqrt(num_honest * variance)
    gap = 10.0 * sum(exp(-2.0 * pi**2 * variance * k / (k + 1)) for k in range(1, num_honest))
    return min(ratio**2 + gap * num_values / 2, (ratio + gap * sqrt(num_values)) ** 2) / 2


def assured_multiplier(
    *, plan: RoundPlan, encoding: PrivateEncoding, num_devices: int, colluder_share: float
) -> float:
    """Say how strong the noise of a sum is at least, as the multiplier of Gaussian noise.

    A sum that is rho-concentrated differentially private tells no more than one with Gaussian
    noise of 1 / sqrt(2 rho) times the longest update (Bun and Steinke, TCC 2016, lemma 2.4).

    Args:
        plan: the round's numbers.
        encoding: what its devices add.
        num_devices: how many are in the sum.
        colluder_share: how many of them add nothing, or tell what they added.

    Returns:
        The multiplier; 0 if nothing is added, or nobody is counted on.
    """
    num_honest = num_devices - ceil(colluder_share * num_devices)
    if num_honest < 1 or not encoding.variance:
        return 0.0
    rho = distributed_rho(plan=plan, encoding=encoding, num_honest=num_honest)
    return 1.0 / sqrt(2.0 * rho)


def central_std(*, noise_multiplier: float, max_norm: float, num_devices: int) -> float:
    """Give the standard deviation of the noise that the coordinator adds to a mean.

    Args:
        noise_multiplier: over the longest update.
        max_norm: the longest update; of a masked sum what `longest_levels` makes of it.
        num_devices: how many are in the mean, each counted once.
    """
    return noise_multiplier * max_norm / num_devices


def _length(levels: NDArray[np.int32]) -> float:
    """Give the Euclidean length."""
    parts = np.array_split(levels, -(-levels.size // BLOCK_VALUES))
    return sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))
