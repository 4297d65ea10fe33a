"""Noise for differential privacy, drawn from AES-CTR keystreams.

`DiscreteNoise` is exact: integers with the probabilities of the discrete Gaussian, made of uniform
bits by comparisons of integers alone (Canonne, Kamath and Steinke, NeurIPS 2020, algorithms 1 to
3). `add_gaussian` is the usual one in float64, whose last bits are not those of real numbers
(Mironov, CCS 2012); it is added where the mean is floating point anyway.
"""

from collections.abc import Callable
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.errors import PrivacyError
from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.masking import MASK_KEY_BYTES, Keystream, new_scratch

MAX_VARIANCE: Final = 1 << 24
"""Beyond it the integers that `DiscreteNoise` compares would not fit in 64 bits."""

RandomBytes = Callable[[int], bytes]

_Integers = NDArray[np.int64]
_Unsigned = NDArray[np.uint64]


class _Bits:
    """Uniform 64-bit integers."""

    def __init__(self, random_bytes: RandomBytes) -> None:
        self._stream, self._scratch = Keystream(random_bytes(MASK_KEY_BYTES)), new_scratch()

    def words(self, num: int) -> _Unsigned:
        """Give uniform words."""
        words = np.empty(num, np.uint64)
        halves = words.view(np.uint32)
        for low in range(0, halves.size, BLOCK_VALUES):
            part = halves[low : low + BLOCK_VALUES]
            part[:] = self._stream.next_into(self._scratch, part.size)
        return words

    def below(self, limit: int, num: int) -> _Unsigned:
        """Give uniform integers from 0 to below a limit; what would favour some is drawn again."""
        modulus = np.uint64(limit)
        last = np.uint64((1 << 64) // limit * limit - 1)
        words = self.words(num)
        while (again := words > last).any():
            words[again] = self.words(int(again.sum()))
        return words % modulus


def add_gaussian(values: NDArray[np.float32], std: float, random_bytes: RandomBytes) -> None:
    """Add independent Gaussian noise of mean 0 to values in place.

    Args:
        values: shape `(n,)`.
        std: the standard deviation, from 0 on.
        random_bytes: source of randomness; 16 bytes are asked for.
    """
    bits = _Bits(random_bytes)
    for low in range(0, values.size, BLOCK_VALUES):
        block = values[low : low + BLOCK_VALUES]
        block += std * _normals(bits, block.size)


def draw_gaussian(std: float, random_bytes: RandomBytes) -> float:
    """Give one Gaussian number of mean 0."""
    return float(std * _normals(_Bits(random_bytes), 1)[0])


def _normals(bits: _Bits, num: int) -> NDArray[np.float64]:
    """Give standard normal numbers (Box and Muller, 1958): of two uniform ones, two."""
    half = -(-num // 2)
    uniform = (bits.words(2 * half) >> np.uint64(11)).astype(np.float64) + 0.5  # never 0
    uniform *= 2.0**-53
    length, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:num]


class DiscreteNoise:
    """Integers k with probabilities proportional to exp(-k² / (2 variance)), exactly.

    Args:
        variance: from 1 to `MAX_VARIANCE`; also the variance of what is drawn, to within 1e-6
            of it from a variance of 1 on.
        random_bytes: source of randomness; 16 bytes are asked for.

    Raises:
        PrivacyError: the variance is out of its range.
    """

    def __init__(self, variance: int, random_bytes: RandomBytes) -> None:
        if not 1 <= variance <= MAX_VARIANCE:
            raise PrivacyError(
                f"the noise's variance is {variance} squared levels; it must be from 1 to "
                f"{MAX_VARIANCE}: choose value_bits so that levels are about as wide as the noise"
            )
        self._variance, self._scale = variance, isqrt(variance) + 1
        self._bits = _Bits(random_bytes)

    def draw(self, num: int) -> _Integers:
        """Give independent integers, shape `(num,)`."""
        drawn = np.empty(num, np.int64)
        for low in range(0, num, BLOCK_VALUES):
            block = drawn[low : low + BLOCK_VALUES]
            missing = np.arange(block.size)
            while missing.size:
                proposed = self._laplace(missing.size)
                taken = self._is_gaussian(proposed)
                block[missing[taken]] = proposed[taken]
                missing = missing[~taken]
        return drawn

    def _is_gaussian(self, proposed: _Integers) -> NDArray[np.bool_]:
        """Take a proposal with the probability that makes Laplace Gaussian (algorithm 3)."""
        variance, scale = self._variance, self._scale
        # |k| exceeds 200 scales once in e**200 proposals; below that, squares fit in 64 bits.
        distance = np.abs(np.abs(proposed) * scale - variance).astype(np.uint64)
        return self._keep(distance * distance, 2 * variance * scale * scale)

    def _laplace(self, num: int) -> _Integers:
        """Give integers k with probabilities proportional to exp(-|k| / scale) (algorithm 2)."""
        drawn = np.empty(num, np.int64)
        missing = np.arange(num)
        while missing.size:
            low = self._bits.below(self._scale, missing.size)
            size = low.astype(np.int64) + self._scale * self._num_successes(missing.size)
            is_negative = self._bits.below(2, missing.size).astype(bool)
            taken = self._keep(low, self._scale) & ~(is_negative & (size == 0))
            drawn[missing[taken]] = np.where(is_negative, -size, size)[taken]
            missing = missing[~taken]
        return drawn

    def _num_successes(self, num: int) -> _Integers:
        """Count how often in a row an event of probability 1 / e happens."""
        count = np.zeros(num, np.int64)
        going = np.arange(num)
        while going.size:
            going = going[self._keep(np.ones(going.size, np.uint64), 1)]
            count[going] += 1
        return count

    def _keep(self, numerators: _Unsigned, denominator: int) -> NDArray[np.bool_]:
        """Say yes with probability exp(-numerator / denominator) (algorithm 1)."""
        wholes, rest = np.divmod(numerators, np.uint64(denominator))
        kept = self._keep_fraction(rest, denominator)
        going = np.flatnonzero(kept & (wholes > 0))
        while going.size:
            yes = self._keep_fraction(np.ones(going.size, np.uint64), 1)
            kept[going[~yes]] = False
            wholes[going] -= np.uint64(1)
            going = going[yes & (wholes[going] > 0)]
        return kept

    def _keep_fraction(self, numerators: _Unsigned, denominator: int) -> NDArray[np.bool_]:
        """The same for a fraction of at most 1: after how many coins is one tails, odd or even?"""
        kept = np.empty(numerators.size, bool)
        going, k = np.arange(numerators.size), 1
        while going.size:
            heads = self._bits.below(denominator * k, going.size) < numerators[going]
            kept[going[~heads]] = k % 2 == 1
            going, k = going[heads], k + 1
        return kept
