"""Random rotation: spreads every value of an update over many coordinates, and takes it back.

An update's coordinates differ in size by orders of magnitude, and a fixed-point range must hold the
largest. Random signs and a Walsh-Hadamard transform make all coordinates of a block about equally
large: each becomes a sum of all of them under random signs, so it exceeds c with probability at
most `2 exp(-c**2 / (2 * mean square of the block))` (Hoeffding). A smaller range then holds nearly
all of them, and the same step takes fewer bits. Suresh et al., "Distributed mean estimation with
limited communication", ICML 2017, section 3; Kairouz et al., "The distributed discrete Gaussian
mechanism for federated learning with secure aggregation", ICML 2021, section 4.

The rotation is linear and preserves lengths: the mean of rotated updates is the rotated mean, and
an error of some length in it stays as long. It hides nothing: everybody can undo it.

A vector is padded with zeros and cut into blocks of B coordinates. Block j takes every n-th
coordinate from the j-th on, n being the number of blocks: each block has its share of every layer,
and the transform runs over rows of n neighbours in memory. In formulas, for the padded vector x,
signs s and block j:

    x.reshape(B, n)[:, j]  ->  H (s * x).reshape(B, n)[:, j],   H = Hadamard matrix / sqrt(B)

with Sylvester's order of H, and s[i] = -1 where bit i of the signs' AES-CTR stream is set, counted
from the lowest bit of the first byte on.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.secagg.masking import Keystream, new_scratch

MAX_BLOCK: Final = 4096
"""Coordinates that are mixed; more would gain little, and cost padding and time."""

MIN_BLOCK: Final = 64

_BLOCKS: Final = 32
"""A vector has at least so many blocks, down to the smallest block: padding stays within 3 %."""

_TILE_VALUES: Final = 1 << 17
"""512 KB of float32 values, with as many for what is in between: they stay in the cache."""

_SIGNS_AT_ONCE: Final = 1 << 21
"""Signs that one buffer of the keystream holds."""


def block_size(num_values: int) -> int:
    """Choose a block's coordinates for a vector: a power of two."""
    largest = max(num_values // _BLOCKS, MIN_BLOCK)
    return min(1 << (largest.bit_length() - 1), MAX_BLOCK)


def padded_size(num_values: int) -> int:
    """Say how many coordinates a vector of `num_values` has after the rotation."""
    block = block_size(num_values)
    return -(-num_values // block) * block


def rotate(values: NDArray[np.float32], key: bytes) -> NDArray[np.float32]:
    """Rotate a vector.

    Args:
        values: Shape `(n,)`; kept as they are.
        key: 16 bytes that the signs are drawn from.

    Returns:
        Shape `(padded_size(n),)`.
    """
    rotated = np.zeros(padded_size(values.size), np.float32)
    rotated[: values.size] = values
    _flip_signs(rotated, key)
    _transform(rotated, block_size(values.size))
    return rotated


def rotate_back(rotated: NDArray[np.float32], num_values: int, key: bytes) -> NDArray[np.float32]:
    """Undo a rotation.

    Args:
        rotated: Shape `(padded_size(num_values),)`; overwritten.
        num_values: Length of the vector that was rotated.
        key: The key that it was rotated with.

    Returns:
        A view of the result, shape `(num_values,)`.
    """
    _transform(rotated, block_size(num_values))
    _flip_signs(rotated, key)
    return rotated[:num_values]


def _flip_signs(values: NDArray[np.float32], key: bytes) -> None:
    """Negate, in place, the values whose bit is set."""
    stream, scratch = Keystream(key), new_scratch()
    for low in range(0, values.size, _SIGNS_AT_ONCE):
        part = values[low : low + _SIGNS_AT_ONCE]
        drawn = stream.next_into(scratch, -(-part.size // 32))
        bits = np.unpackbits(drawn.view(np.uint8), count=part.size, bitorder="little")
        # The top bit of an IEEE 754 number is its sign.
        part.view(np.uint32)[:] ^= bits.astype(np.uint32) << np.uint32(31)


def _transform(values: NDArray[np.float32], block: int) -> None:
    """Apply the Hadamard matrix over the square root of its order to each block, in place."""
    matrix = values.reshape(block, -1)
    width = max(1, _TILE_VALUES // block)
    for left in range(0, matrix.shape[1], width):
        tile = np.ascontiguousarray(matrix[:, left : left + width])
        matrix[:, left : left + width] = _butterflies(tile)


def _butterflies(tile: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform the columns of a tile (fast Walsh-Hadamard transform); the tile is used up."""
    block, width = tile.shape
    spare = np.empty_like(tile)
    tile *= np.float32(block**-0.5)
    half = 1
    while half < block:
        pairs, out = (part.reshape(-1, 2, half, width) for part in (tile, spare))
        np.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        tile, spare, half = spare, tile, 2 * half
    return tile
