"""Packing ring values into few bits."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.errors import MessageError
from minga.federation.secagg.packing import (
    add_packed,
    pack,
    packed_size,
    unpack,
)


def random_values(num_values: int, width: int, seed: int = 0) -> NDArray[np.uint32]:
    values = np.random.default_rng(seed).integers(0, 2**width, num_values, dtype=np.uint64)
    return values.astype(np.uint32)


def bit_stream(values: NDArray[np.uint32], width: int) -> bytes:
    """Pack the slow way, as the format is described."""
    stream = sum(int(value) << (place * width) for place, value in enumerate(values))
    return stream.to_bytes(packed_size(values.size, width), "little")


@pytest.mark.parametrize("width", range(1, 33))
@pytest.mark.parametrize("num_values", [1, 7, 8, 9, 31, 32, 33, 1000])
def test_format_is_a_little_endian_bit_stream(num_values: int, width: int):
    """Packing gives the described bytes, and unpacking the values, at every width and length."""
    values = random_values(num_values, width)
    packed = pack(values, width)
    assert packed == bit_stream(values, width)
    np.testing.assert_array_equal(unpack(packed, num_values, width), values)


@pytest.mark.parametrize("width", [1, 7, 23, 32])
@pytest.mark.parametrize("extra", [-8, -1, 0, 1, 8])
def test_blocks_join_without_a_seam(width: int, extra: int):
    """Vectors longer than a block pack like short ones."""
    values = random_values(2 * BLOCK_VALUES + extra, width)
    packed = pack(values, width)
    assert len(packed) == packed_size(values.size, width)
    np.testing.assert_array_equal(unpack(packed, values.size, width), values)


@given(
    width=st.integers(1, 32),
    num_values=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 37), max_size=5),
    seed=st.integers(0, 99),
)
def test_pieces_add_like_the_whole(width: int, num_values: int, cuts: list[int], seed: int):
    """Cut at multiples of eight values, a vector packs and adds piece by piece."""
    values = random_values(num_values, width, seed)
    packed = pack(values, width)
    whole = random_values(num_values, 32, seed + 1)
    pieces = whole.copy()
    add_packed(whole, packed, width)
    places = sorted({0, num_values, *(8 * cut for cut in cuts if 8 * cut < num_values)})
    for low, high in pairwise(places):
        piece = packed[packed_size(low, width) : packed_size(high, width)]
        assert piece == pack(values[low:high], width)
        add_packed(pieces[low:high], piece, width)
    np.testing.assert_array_equal(pieces, whole)


def test_packing_keeps_the_low_bits():
    """Bits above the width are dropped: that is the reduction to the ring."""
    values = random_values(100, 32)
    np.testing.assert_array_equal(unpack(pack(values, 20), 100, 20), values & (2**20 - 1))


@pytest.mark.parametrize(
    "spoil",
    [lambda p: p[:-1], lambda p: p + b"\0", lambda _: b""],
    ids=["cut", "lengthened", "empty"],
)
def test_wrong_length_adds_nothing(spoil):
    """A cut or lengthened vector is refused before anything is added."""
    total = np.zeros(100, np.uint32)
    with pytest.raises(MessageError, match="expected 299"):
        add_packed(total, spoil(pack(random_values(100, 23), 23)), 23)
    assert not total.any()


def test_bits_after_the_last_value_add_nothing():
    """Padding that is not zero is refused: two uploads never differ in it alone."""
    total = np.zeros(101, np.uint32)
    packed = bytearray(pack(random_values(101, 23), 23))
    packed[-1] |= 0x80
    with pytest.raises(MessageError, match="after its last value"):
        add_packed(total, packed, 23)
    assert not total.any()


@pytest.mark.parametrize("width", [0, 33])
def test_impossible_widths_are_refused(width: int):
    """A width outside of 1 to 32 bits is the caller's mistake."""
    with pytest.raises(ValueError, match=f"width is {width}"):
        pack(random_values(8, 8), width)
