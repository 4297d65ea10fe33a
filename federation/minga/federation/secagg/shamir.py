"""Secret sharing over the prime field of 2**256 + 297 (Shamir, CACM 1979).

The field is just large enough for a 32-byte secret in one piece. A secret is the value at zero of a
random polynomial of degree `threshold - 1`; a share is its value elsewhere. Any `threshold` shares
give the polynomial; with fewer, every secret is equally likely.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import accumulate
from typing import Final, Self

PRIME: Final = 2**256 + 297
"""The smallest prime above 2**256."""

SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33

_DRAW_BYTES: Final = 48
"""Reducing 384 random bits is uniform in the field up to 2**-127."""


def split(
    secret: bytes, threshold: int, xs: Sequence[int], random_bytes: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Share a secret.

    Args:
        secret: 32 bytes.
        threshold: How many shares rebuild it.
        xs: Where the shares are taken, distinct and not zero in the field.
        random_bytes: Source of randomness.

    Returns:
        x -> share of 33 bytes.

    Raises:
        ValueError: places are zero, equal or fewer than the threshold, or a wrong length.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(xs):
        raise ValueError(f"threshold {threshold} of {len(xs)} shares")
    _check_places(xs)
    drawn = random_bytes(_DRAW_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(drawn[at : at + _DRAW_BYTES]) % PRIME
        for at in range(0, len(drawn), _DRAW_BYTES)
    ]
    coefficients.append(int.from_bytes(secret))
    return {x: _evaluate(coefficients, x).to_bytes(SHARE_BYTES) for x in xs}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes | None:
    """Rebuild a secret from `threshold` of its shares, those with the smallest places.

    Returns:
        32 bytes, or None where the polynomial's value is no secret: a share is wrong.

    Raises:
        ValueError: fewer shares than the threshold.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, {threshold} are needed")
    xs = sorted(shares)[:threshold]
    return Interpolation(xs).secret([shares[x] for x in xs])


def is_share(share: bytes) -> bool:
    """Tell whether the bytes are an element of the field."""
    return len(share) == SHARE_BYTES and int.from_bytes(share) < PRIME


class Interpolation:
    """The weights that turn shares at fixed places into a polynomial's value at one place.

    Making it costs `len(xs)**2` products and one inversion; using it, one product per share.
    Secrets shared among the same devices are rebuilt with the same weights.
    """

    __slots__ = ("_at", "_weights")

    def __init__(self, xs: Sequence[int], at: int = 0) -> None:
        _check_places(xs)
        above = _products_of_others([at - x for x in xs])
        below = _inverses([_product_of_distances(x, xs) for x in xs])
        self._at = at
        self._weights = {
            x: upper * lower % PRIME for x, upper, lower in zip(xs, above, below, strict=True)
        }

    def without(self, x: int) -> Self:
        """Leave out one place, for two products per remaining one and one inversion.

        It takes the factor `(at - x) / (x_i - x)` out of every weight again.

        Args:
            x: One of at least two places, and not the one that the value is taken at.
        """
        factor = pow(self._at - x, -1, PRIME)
        fewer = copy(self)
        fewer._weights = {
            place: weight * (place - x) % PRIME * factor % PRIME
            for place, weight in self._weights.items()
            if place != x
        }
        return fewer

    def value(self, shares: Sequence[bytes]) -> int:
        """Give the polynomial's value, from shares in the order of the places."""
        terms = zip(self._weights.values(), shares, strict=True)
        return sum(weight * int.from_bytes(share) for weight, share in terms) % PRIME

    def secret(self, shares: Sequence[bytes]) -> bytes | None:
        """Give the value as a secret; None if it is too large for one."""
        value = self.value(shares)
        return value.to_bytes(SECRET_BYTES) if value < 2 ** (8 * SECRET_BYTES) else None


def _check_places(xs: Sequence[int]) -> None:
    places = {x % PRIME for x in xs}
    if len(places) != len(xs) or 0 in places:
        raise ValueError("shares need distinct places other than zero")


def _product_of_distances(x: int, xs: Sequence[int]) -> int:
    """Multiply the distances from one place to all the others."""
    product = 1
    for other in xs:
        if other != x:
            product = product * (x - other) % PRIME
    return product


def _products_of_others(factors: Sequence[int]) -> list[int]:
    """Give for each factor the product of all the others."""
    before = _running_products(factors)
    behind = reversed(_running_products(factors[::-1]))
    return [left * right % PRIME for left, right in zip(before, behind, strict=True)]


def _running_products(factors: Sequence[int]) -> list[int]:
    """Give for each factor the product of those before it."""
    return list(accumulate(factors[:-1], lambda a, b: a * b % PRIME, initial=1))


def _inverses(values: Sequence[int]) -> list[int]:
    """Invert all values with one inversion, which costs as much as 50 products (Montgomery)."""
    inverse = pow(math.prod(values) % PRIME, -1, PRIME)
    return [others * inverse % PRIME for others in _products_of_others(values)]


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule, highest power first."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value
