"""Masks: the keystream, its seeking, and that masks cancel."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.masking import (
    Keystream,
    Mask,
    apply_masks,
    apply_masks_threaded,
    new_scratch,
    split_range,
)

KEY = bytes(range(16))
LONG = 2 * BLOCK_VALUES + 77


def stream(num_values: int, start: int = 0, key: bytes = KEY) -> np.ndarray:
    values = np.zeros(num_values, np.uint32)
    apply_masks(values, [Mask(key=key, sign=1)], start=start)
    return values


def test_keystream_is_aes_ctr():
    """The stream is that of NIST SP 800-38A, F.5.1 (CTR-AES128.Encrypt)."""
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    counter = 0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
        "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee"
    )
    stream = Keystream(key, start=4 * counter).next_into(new_scratch(), 16).tobytes()
    assert bytes(a ^ b for a, b in zip(stream, plain, strict=True)) == cipher


@given(start=st.integers(0, LONG), num_values=st.integers(1, 200))
def test_stream_can_be_entered_anywhere(start: int, num_values: int):
    """A range's masks are the same whether the stream is read from its start or from there."""
    whole = stream(LONG + 200)
    np.testing.assert_array_equal(stream(num_values, start), whole[start : start + num_values])


@given(
    num_devices=st.integers(2, 6),
    num_values=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_pairwise_masks_cancel(num_devices: int, num_values: int, seed: int):
    """Summed over both ends of all pairs, nothing is left but the values."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32, (num_devices, num_values), dtype=np.uint32)
    masked = values.copy()
    for low in range(num_devices):
        for high in range(low + 1, num_devices):
            mask = Mask(key=rng.bytes(16), sign=1)
            apply_masks(masked[low], [mask])
            apply_masks(masked[high], [mask.inverse()])
    assert not np.array_equal(masked, values)
    np.testing.assert_array_equal(
        masked.sum(axis=0, dtype=np.uint32), values.sum(axis=0, dtype=np.uint32)
    )


@pytest.mark.parametrize("num_values", [1, BLOCK_VALUES, LONG])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_give_what_one_pass_gives(num_values: int, num_threads: int):
    """Splitting the vector over threads changes nothing."""
    masks = [Mask(key=bytes([n]) * 16, sign=1 if n % 2 else -1) for n in range(5)]
    once = np.arange(num_values, dtype=np.uint32)
    split = once.copy()
    apply_masks(once, masks)
    apply_masks_threaded(split, masks, num_threads)
    np.testing.assert_array_equal(split, once)


@given(num_values=st.integers(0, 10 * BLOCK_VALUES), num_parts=st.integers(1, 9))
def test_ranges_cover_the_vector(num_values: int, num_parts: int):
    """The ranges of a split vector follow on each other, in whole blocks."""
    ranges = split_range(num_values, num_parts)
    assert 1 <= len(ranges) <= num_parts
    assert ranges[0].start == 0
    assert ranges[-1].stop == num_values
    for left, right in pairwise(ranges):
        assert left.stop == right.start
        assert right.start % BLOCK_VALUES == 0


def test_a_mask_shows_no_key_but_travels():
    """Printing a mask hides its key; another process gets all of it."""
    mask = Mask(key=KEY, sign=-1)
    assert repr(mask) == "Mask(sign=-1)"
    assert pickle.loads(pickle.dumps(mask)) == mask
