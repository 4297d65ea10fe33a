"""Model parameters as named float32 arrays: their bytes, their vector and their layout.

Bytes are safetensors: reading them runs no code, whoever wrote them.
"""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load

from minga.federation.durable import Piece
from minga.federation.errors import MissingBlobError, PeerError
from minga.federation.memory import BLOCK_VALUES

Parameters = dict[str, NDArray[np.float32]]
"""Tensor name -> float32 array."""

_VALUE: Final = np.dtype("<f4")
_LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which tensors, in which order and shape, a parameter vector is made of."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: Parameters) -> Self:
        """Give the layout of some parameters; names are sorted: a dict's order is an accident."""
        names = tuple(sorted(parameters))
        return cls(names=names, shapes=tuple(parameters[name].shape for name in names))

    @property
    def num_values(self) -> int:
        """Length of the vector."""
        return sum(prod(shape) for shape in self.shapes)

    def flatten(self, parameters: Parameters) -> NDArray[np.float32]:
        """Lay the tensors out as one vector, shape `(num_values,)`.

        Raises:
            PeerError: names or shapes are not those of this layout.
        """
        other = Layout.of(parameters)
        if other != self:
            raise PeerError(f"parameters do not fit the model: {self._difference(other)}")
        if not self.names:
            return np.empty(0, np.float32)
        return np.concatenate(
            [np.asarray(parameters[name], np.float32).ravel() for name in self.names]
        )

    def unflatten(self, vector: NDArray[np.float32]) -> Parameters:
        """Cut a vector of shape `(num_values,)` into tensors that share its memory.

        Raises:
            PeerError: the vector has another length.
        """
        if vector.shape != (self.num_values,):
            raise PeerError(f"a vector of shape {vector.shape} is not ({self.num_values},)")
        ends = np.cumsum([prod(shape) for shape in self.shapes])[:-1]
        parts = np.split(vector, ends)
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def _difference(self, other: "Layout") -> str:
        mine = dict(zip(self.names, self.shapes, strict=True))
        theirs = dict(zip(other.names, other.shapes, strict=True))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return f"tensor {name!r} is {theirs.get(name)}, expected {mine.get(name)}"
        return "the order of tensors differs"


def to_bytes(parameters: Parameters) -> bytes:
    """Write parameters as safetensors, the same bytes for the same values."""
    return b"".join(to_pieces(parameters))


def to_pieces(parameters: Parameters) -> list[Piece]:
    """Write parameters as the pieces of a safetensors file; tensors stay where they are.

    That is the length of a header, in 8 bytes; the header, JSON that names each tensor's type,
    shape and place, filled up with spaces to a multiple of 8; and the values, one tensor behind the
    other (the format's description: https://github.com/huggingface/safetensors).

    Returns:
        The head, and the values of each tensor that has any.
    """
    layout = Layout.of(parameters)
    places, start = {}, 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        stop = start + _VALUE.itemsize * prod(shape)
        places[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, stop)}
        start = stop
    head = json.dumps(places, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    values = [np.asarray(parameters[name], _VALUE, order="C") for name in layout.names]
    data = [tensor.reshape(-1).view(np.uint8).data for tensor in values if tensor.size]
    return [_LENGTH.pack(len(head)) + head, *data]


def from_bytes(data: bytes) -> Parameters:
    """Read parameters from safetensors.

    Raises:
        PeerError: the bytes are no safetensors file, or a tensor is not float32.
    """
    with _safetensors():
        tensors: Parameters = load(data)
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise PeerError(f"tensor {name!r} is {tensor.dtype}, expected float32")
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFile:
    """A safetensors file of float32 tensors whose header was read and found sound.

    It is not mapped: pages of a mapped file that were read count as this process's memory, and
    fetching them one by one takes longer than copying them does.
    """

    path: Path
    layout: Layout
    starts: tuple[int, ...]
    """Where each tensor of the layout begins, in bytes."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a file's header; no values are read.

        Raises:
            PeerError: see `from_bytes`.
            MissingBlobError: there is no such file.
        """
        with _safetensors(), safetensors.safe_open(path, framework="numpy") as file:
            layout = _layout_of(file)
            in_order = file.offset_keys()
        # The library has made sure that tensors lie one behind the other, up to the file's end.
        sizes = {
            name: _VALUE.itemsize * prod(shape)
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        }
        start, starts = path.stat().st_size - sum(sizes.values()), {}
        for name in in_order:
            starts[name] = start
            start += sizes[name]
        return cls(path=path, layout=layout, starts=tuple(starts[name] for name in layout.names))

    def tensors(self) -> Iterator[NDArray[np.float32]]:
        """Read the tensors one by one, in the order of the layout.

        Raises:
            PeerError: the file was cut meanwhile.
        """
        with self.path.open("rb", buffering=0) as file:
            for shape, start in zip(self.layout.shapes, self.starts, strict=True):
                tensor = np.empty(shape, _VALUE)
                _fill(tensor, file, start)
                yield tensor

    def blocks(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Read the values in blocks, in the order of the layout; raises what `tensors` does.

        Returns:
            Each block's tensor and values, shape `(n,)`; n is at most `BLOCK_VALUES`.
        """
        with self.path.open("rb", buffering=0) as file:
            for name, shape, start in zip(
                self.layout.names, self.layout.shapes, self.starts, strict=True
            ):
                num_values = prod(shape)
                for first in range(0, num_values, BLOCK_VALUES):
                    block = np.empty(min(BLOCK_VALUES, num_values - first), _VALUE)
                    _fill(block, file, start + first * _VALUE.itemsize)
                    yield name, block


def _fill(values: NDArray[np.float32], file: FileIO, offset: int) -> None:
    """Read values from an offset on."""
    left = values.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(file.fileno(), [left], offset)
        if not count:
            raise PeerError("the file of tensors was cut while it was read")
        left, offset = left[count:], offset + count


def read_layout(path: Path) -> Layout:
    """Read the layout of a safetensors file; raises what `ParameterFile.open` does."""
    return ParameterFile.open(path).layout


def read_parameters(path: Path) -> Parameters:
    """Read all tensors of a safetensors file; raises what `ParameterFile.open` does."""
    file = ParameterFile.open(path)
    return dict(zip(file.layout.names, file.tensors(), strict=True))


def _layout_of(file: Any) -> Layout:
    names = tuple(sorted(file.keys()))
    slices = [file.get_slice(name) for name in names]
    for name, entry in zip(names, slices, strict=True):
        if entry.get_dtype() != "F32":
            raise PeerError(f"tensor {name!r} is {entry.get_dtype()}, expected float32")
    return Layout(names=names, shapes=tuple(tuple(entry.get_shape()) for entry in slices))


@contextmanager
def _safetensors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingBlobError(f"there is no model: {error}") from error
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PeerError(f"not a safetensors file: {error}") from error
