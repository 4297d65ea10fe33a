"""A bound on the updates' length that follows them (Andrew et al., NeurIPS 2021, algorithm 1).

The bound is to be as long as a quantile of the updates: the median is a good choice. Each device
says in one bit whether its update was within the bound; the mean of the bits, with noise of its
own, says how far the bound is off, and it moves by a factor. The bits cost little privacy: the
noise on the updates grows a bit so that both together spend what the updates alone did.

In plain rounds the coordinator sees the lengths. In secure ones the bit travels as one more masked
coordinate (`privacy.PrivateEncoding`), so that only the bits' sum is ever seen; where devices add
the noise, that sum has their noise in it.
"""

from dataclasses import dataclass
from math import exp, isfinite, sqrt

from minga.federation.aggregation.noise import RandomBytes, draw_gaussian
from minga.federation.errors import PrivacyError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClip:
    """How the bound follows the updates.

    Attributes:
        quantile: the share of updates that are to be within the bound, between 0 and 1.
        learning_rate: the bound moves by at most this factor's exponential, above 0.
        bit_noise: standard deviation of the noise on the mean of bits, above 0; a twentieth is
            what Andrew et al. use.

    Raises:
        PrivacyError: a number is out of its range.
    """

    quantile: float
    learning_rate: float
    bit_noise: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise PrivacyError(f"quantile is {self.quantile:g}; it must be between 0 and 1")
        for name in ("learning_rate", "bit_noise"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise PrivacyError(f"{name} is {value:g}; it must be above 0 and finite")

    def update_noise(self, noise_multiplier: float, num_devices: int) -> float:
        """Give the noise multiplier for the updates, so that with the bits all is as private.

        With a standard deviation of s on the sum of bits, that is (z**-2 - (2 s)**-2)**-1/2: a bit
        less one half is at most 1/2 either way, hence the 2 (Andrew et al., theorem 1).

        Args:
            noise_multiplier: what updates and bits together are to spend.
            num_devices: how many are in the round; where devices add the noise, how many are
                counted on for it.

        Raises:
            PrivacyError: the bits alone spend more than that.
        """
        rest = noise_multiplier**-2 - (2.0 * self.bit_noise * num_devices) ** -2
        if rest <= 0:
            needed = noise_multiplier / (2.0 * self.bit_noise)
            raise PrivacyError(
                f"a bound that follows {num_devices} devices tells more than a noise_multiplier of "
                f"{noise_multiplier:g} allows; it takes more than {needed:.0f} devices (that are "
                "counted on for noise, where devices add it), or a fixed bound"
            )
        return 1.0 / sqrt(rest)

    def bit_length(self, noise_multiplier: float, num_devices: int) -> float:
        """Give how long a bit is beside the longest update, where both get the same noise.

        Yes is written as plus this length, no as minus it, so that noise of a standard deviation S
        is S / (2 lengths) on the sum of bits: this length makes that `bit_noise` a device. Update
        and bit are then one vector. With both at right angles, S over its length is
        `noise_multiplier` again.

        Args:
            noise_multiplier: what updates and bits together are to spend.
            num_devices: how many add the noise.

        Raises:
            PrivacyError: the bits alone spend more than that.
        """
        return self.update_noise(noise_multiplier, num_devices) / (
            2.0 * self.bit_noise * num_devices
        )

    def blur(self, share: float, random_bytes: RandomBytes) -> float:
        """Add the noise to the share of updates that were within the bound."""
        return share + draw_gaussian(self.bit_noise, random_bytes)

    def next_norm(self, max_norm: float, share: float) -> float:
        """Move the bound.

        Args:
            max_norm: the bound that the updates were held against.
            share: of them that were within it, with noise.

        Returns:
            The next bound; it goes up where too few were within. Whatever the share says, it moves
            by no more than exp(learning_rate).
        """
        # A share is between 0 and 1 but for its noise, which with few devices may be anything, and
        # but for devices that lie about their bits.
        return max_norm * exp(-self.learning_rate * (min(1.0, max(0.0, share)) - self.quantile))
