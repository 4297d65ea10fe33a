"""Secret sharing."""

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.federation.secagg.shamir import (
    PRIME,
    SHARE_BYTES,
    Interpolation,
    combine,
    is_share,
    split,
)

from .simulator import seeded_bytes

secrets = st.binary(min_size=32, max_size=32)
places = st.lists(st.integers(1, PRIME - 2), min_size=2, max_size=9, unique=True)


def is_prime(number: int, rounds: int = 40) -> bool:
    """Run Miller-Rabin on the first primes' and some further bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 2 + rounds):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_field_is_the_smallest_prime_field_for_32_bytes():
    """2**256 + 297 is prime, and no number between 2**256 and it is."""
    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))


@given(secret=secrets, xs=places, seed=st.integers(0, 2**32), data=st.data())
def test_any_threshold_of_shares_rebuilds(secret: bytes, xs: list[int], seed: int, data):
    """Every choice of enough shares gives the secret back."""
    threshold = data.draw(st.integers(1, len(xs)))
    shares = split(secret, threshold, xs, seeded_bytes(seed))
    assert list(shares) == xs
    assert all(is_share(share) for share in shares.values())
    for chosen in combinations(xs, threshold):
        assert combine({x: shares[x] for x in chosen}, threshold) == secret
    assert combine(shares, threshold) == secret


@given(secret=secrets, other=secrets, xs=places, seed=st.integers(0, 2**32))
def test_one_share_less_fits_every_secret(secret: bytes, other: bytes, xs: list[int], seed: int):
    """All but one of the needed shares go with any other secret just as well."""
    threshold = len(xs)
    shares = split(secret, threshold, xs, seeded_bytes(seed))
    known = {x: shares[x] for x in xs[1:]}
    # The polynomial through the known shares and the other secret at zero is a possible one:
    # shifting all places by one moves zero to a place that a share may have.
    through = Interpolation([1, *(x + 1 for x in known)], at=xs[0] + 1)
    missing = through.value([bytes(1) + other, *known.values()])
    forged = known | {xs[0]: missing.to_bytes(SHARE_BYTES)}
    assert combine(forged, threshold) == other


@given(xs=places, at=st.integers(0, PRIME - 1), powers=st.lists(st.integers(0, PRIME - 1)))
def test_interpolation_gives_polynomials_back(xs: list[int], at: int, powers: list[int]):
    """Through as many places as it has coefficients, a polynomial is found everywhere."""
    powers = powers[: len(xs)]

    def value(x: int) -> int:
        return sum(coefficient * pow(x, n, PRIME) for n, coefficient in enumerate(powers)) % PRIME

    shares = [value(x).to_bytes(SHARE_BYTES) for x in xs]
    assert Interpolation(xs, at).value(shares) == value(at)


@given(xs=places, secret=secrets, seed=st.integers(0, 2**32), data=st.data())
def test_a_place_can_be_left_out(xs: list[int], secret: bytes, seed: int, data):
    """Weights with one place taken out again are those of the other places."""
    left_out = data.draw(st.sampled_from(xs))
    others = [x for x in xs if x != left_out]
    shares = split(secret, len(others), xs, seeded_bytes(seed))
    rebuilt = Interpolation(xs).without(left_out).secret([shares[x] for x in others])
    assert rebuilt == secret


@given(secret=secrets, seed=st.integers(0, 2**32))
def test_too_few_shares_do_not_rebuild(secret: bytes, seed: int):
    """A polynomial through too few shares misses the secret."""
    shares = split(secret, 4, range(1, 8), seeded_bytes(seed))
    three = {x: shares[x] for x in (1, 2, 3)}
    assert combine(three, 3) != secret
    with pytest.raises(ValueError, match="3 shares, 4 are needed"):
        combine(three, 4)


def test_a_share_looks_uniform():
    """Shares of a constant secret spread evenly over the field (chi-square, 15 degrees)."""
    draw = seeded_bytes("uniform")
    shares = [split(bytes(32), 2, [1, 2], draw)[1] for _ in range(3200)]
    counts = Counter(int.from_bytes(share) * 16 // PRIME for share in shares)
    assert sum((counts[bin_] - 200) ** 2 / 200 for bin_ in range(16)) < 44.3  # p = 0.0001


def test_sharing_uses_fresh_randomness():
    """The same secret is never shared twice in the same way."""
    draw = seeded_bytes("fresh")
    assert split(bytes(32), 3, [1, 2, 3], draw) != split(bytes(32), 3, [1, 2, 3], draw)


@pytest.mark.parametrize(
    ("secret", "threshold", "xs"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(32), 0, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 2, [0, 1]),
        (bytes(32), 2, [PRIME, 1]),
        (bytes(32), 2, [1, 1]),
        (bytes(32), 2, [1, PRIME + 1]),
    ],
)
def test_impossible_sharings_are_refused(secret: bytes, threshold: int, xs: list[int]):
    """A share at zero would be the secret, and equal places would be one share."""
    with pytest.raises(ValueError, match=r"secret has|threshold|places"):
        split(secret, threshold, xs, seeded_bytes(0))


def test_a_false_share_may_leave_the_secrets_range():
    """A polynomial whose value is no 32 bytes is recognised as false."""
    share = (PRIME - 1).to_bytes(SHARE_BYTES)
    assert is_share(share)
    assert combine({1: share}, 1) is None
    assert not is_share(PRIME.to_bytes(SHARE_BYTES))
    assert not is_share(bytes(32))
