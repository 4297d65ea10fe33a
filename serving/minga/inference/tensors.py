"""Tensors of the Open Inference Protocol v2: JSON or raw bytes on the wire, numpy inside.

Both directions are exact or refused: a shape that its data does not fill, a number out of its
datatype's range, a boolean among numbers, a NaN that JSON cannot carry, are errors that name
the tensor. Nothing is rounded, truncated or reinterpreted without a word.

BYTES tensors are arrays of `str`: an ONNX string is UTF-8 text, so bytes that are not UTF-8
are refused here instead of failing inside the model.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md ("Tensor Data"),
and triton-inference-server/server, docs/protocol/extension_binary_data.md.
"""

import math
import struct
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from reprlib import repr as excerpt  # a caller must not choose a message's length
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from minga.inference.errors import BadRequestError

Array = npt.NDArray[Any]

_MAX_RANK: Final = 32  # below numpy's 64, above any network's
_MAX_ELEMENTS: Final = 1 << 40  # keeps an empty tensor's other dimensions within an address space
_STRING_PREFIX_BYTES: Final = 4


class Datatype(StrEnum):
    """The protocol's datatypes that an ONNX model can take or give.

    BF16 is missing on purpose: numpy has no such type, and models that use it inside
    take and give FP32 in practice.
    """

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type, little-endian as on the wire."""
        return _DTYPES[self]

    @classmethod
    def of(cls, array: Array) -> "Datatype":
        """Name the datatype of an array.

        Raises:
            BadRequestError: the protocol has no name for the array's type.
        """
        if array.dtype.kind in "OUS":
            return cls.BYTES
        try:
            return _DATATYPES.get(array.dtype) or _DATATYPES[array.dtype.newbyteorder("<")]
        except KeyError:
            raise BadRequestError(
                f"arrays of {array.dtype} have no datatype in the protocol: "
                "convert to one of bool, int8-64, uint8-64, float16-64 or str"
            ) from None


_DTYPES: Final = {
    Datatype.BOOL: np.dtype("?"),
    Datatype.UINT8: np.dtype("u1"),
    Datatype.UINT16: np.dtype("<u2"),
    Datatype.UINT32: np.dtype("<u4"),
    Datatype.UINT64: np.dtype("<u8"),
    Datatype.INT8: np.dtype("i1"),
    Datatype.INT16: np.dtype("<i2"),
    Datatype.INT32: np.dtype("<i4"),
    Datatype.INT64: np.dtype("<i8"),
    Datatype.FP16: np.dtype("<f2"),
    Datatype.FP32: np.dtype("<f4"),
    Datatype.FP64: np.dtype("<f8"),
    Datatype.BYTES: np.dtype("O"),
}
_DATATYPES: Final = {dtype: datatype for datatype, dtype in _DTYPES.items()}
# Which Python types orjson may have made of the elements.
_JSON_TYPES: Final[dict[str, frozenset[type]]] = {
    "b": frozenset({bool}),
    "u": frozenset({int}),
    "i": frozenset({int}),
    "f": frozenset({int, float}),
    "O": frozenset({str}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, datatype and shape of a model's input or output; -1 is a variable dimension."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor of this shape is one of this specification."""
        return len(shape) == len(self.shape) and all(
            wanted in (-1, given) for wanted, given in zip(self.shape, shape, strict=True)
        )


def parse_shape(value: object, *, name: str) -> tuple[int, ...]:
    """Read a shape from its JSON form.

    Raises:
        BadRequestError: it is no list of non-negative integers, or of absurd size.
    """
    if type(value) is not list or not all(type(dim) is int and dim >= 0 for dim in value):
        raise BadRequestError(
            f"tensor '{name}': shape must be a list of non-negative integers, not {excerpt(value)}"
        )
    if len(value) > _MAX_RANK or math.prod(max(dim, 1) for dim in value) > _MAX_ELEMENTS:
        raise BadRequestError(f"tensor '{name}': shape {excerpt(value)} is too large")
    return tuple(value)


def parse_datatype(value: object, *, name: str) -> Datatype:
    """Read a datatype's name.

    Raises:
        BadRequestError: there is no such datatype here.
    """
    try:
        return Datatype(value)  # type: ignore[arg-type]  # any other type is no member
    except ValueError:
        raise BadRequestError(
            f"tensor '{name}': datatype {excerpt(value)} is not supported; use one of "
            + ", ".join(Datatype)
        ) from None


def from_json(data: object, *, datatype: Datatype, shape: tuple[int, ...], name: str) -> Array:
    """Make an array of a tensor's JSON data, nested by its shape or flat in row-major order.

    Raises:
        BadRequestError: the data does not fill the shape, or an element is not of the datatype.
    """
    if datatype is Datatype.FP16:
        raise BadRequestError(
            f"tensor '{name}': FP16 has no JSON form; send it with the binary tensor extension"
        )
    if type(data) is not list:
        raise BadRequestError(f"tensor '{name}': data must be a list, not {excerpt(data)}")
    flat = _flatten(data, shape, name)
    strange = set(map(type, flat)) - _JSON_TYPES[datatype.dtype.kind]
    if strange:
        kinds = ", ".join(sorted(kind.__name__ for kind in strange))
        raise BadRequestError(f"tensor '{name}': {datatype} data must not contain {kinds}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=datatype.dtype)
    except OverflowError:
        raise _out_of_range(name, datatype) from None
    if datatype.dtype.kind == "f" and not np.isfinite(array).all():
        raise _out_of_range(name, datatype)
    return array.reshape(shape)


def from_binary(
    buffer: memoryview, *, datatype: Datatype, shape: tuple[int, ...], name: str
) -> Array:
    """Make an array of a tensor's raw bytes, without a copy where alignment allows.

    Raises:
        BadRequestError: the bytes do not fill the shape exactly, or are no values of the datatype.
    """
    if datatype is Datatype.BYTES:
        strings = _parse_strings(buffer, math.prod(shape), name)
        array = np.empty(len(strings), dtype=object)
        array[:] = strings
        return array.reshape(shape)
    wanted = math.prod(shape) * datatype.dtype.itemsize
    if len(buffer) != wanted:
        raise BadRequestError(
            f"tensor '{name}': {datatype} of shape {list(shape)} takes {wanted} bytes, "
            f"got {len(buffer)}"
        )
    if datatype is Datatype.BOOL and wanted and np.frombuffer(buffer, np.uint8).max() > 1:
        raise BadRequestError(f"tensor '{name}': BOOL bytes must be 0 or 1")
    array = np.frombuffer(buffer, datatype.dtype).reshape(shape)
    # The JSON part before the tensor has any length; onnxruntime loads aligned words.
    return array if array.flags.aligned else array.copy()


def to_json(array: Array, *, name: str) -> object:
    """Give the flat row-major form of an array that orjson writes without loss.

    Raises:
        BadRequestError: JSON cannot carry a value; the caller must ask for binary output.
    """
    if array.dtype.kind in "OUS":
        return _strings(array, name)
    if array.dtype == np.float16:
        raise BadRequestError(f"output '{name}': FP16 has no JSON form; ask for binary output")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequestError(
            f"output '{name}' holds NaN or infinity, which JSON cannot carry; ask for binary output"
        )
    return np.ascontiguousarray(array).ravel()


def to_binary(array: Array, *, name: str) -> bytes:
    """Give an array's raw little-endian row-major bytes.

    Raises:
        BadRequestError: an array of objects holds something else than text.
    """
    if array.dtype.kind in "OUS":
        encoded = [item.encode() for item in _strings(array, name)]
        return b"".join(
            chain.from_iterable((struct.pack("<I", len(item)), item) for item in encoded)
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _flatten(data: list[Any], shape: tuple[int, ...], name: str) -> list[Any]:
    """Flatten nested data level by level; ragged or half-nested data fits no shape."""
    is_flat = not data or type(data[0]) is not list
    level = data
    fits = len(data) == (math.prod(shape) if is_flat else shape[0] if shape else 1)
    for dim in () if is_flat else shape[1:]:
        if not fits or not level:
            break
        fits = all(type(item) is list and len(item) == dim for item in level)
        level = list(chain.from_iterable(level)) if fits else level
    if not fits:
        raise BadRequestError(
            f"tensor '{name}': data does not fill shape {list(shape)}; "
            "nest it by the shape or give it flat in row-major order"
        )
    return level


def _parse_strings(buffer: memoryview, count: int, name: str) -> list[str]:
    if count * _STRING_PREFIX_BYTES > len(buffer):  # before the loop: a shape is cheap to write
        raise BadRequestError(f"tensor '{name}': {len(buffer)} bytes hold no {count} strings")
    strings = []
    offset = 0
    for _ in range(count):
        start = offset + _STRING_PREFIX_BYTES
        prefix = buffer[offset:start]
        offset = start + int.from_bytes(prefix, "little")
        if len(prefix) < _STRING_PREFIX_BYTES or offset > len(buffer):
            raise BadRequestError(f"tensor '{name}': the last string is cut off")
        try:
            strings.append(str(buffer[start:offset], "utf-8"))
        except UnicodeDecodeError:
            raise BadRequestError(f"tensor '{name}': a string is not UTF-8") from None
    if offset != len(buffer):
        raise BadRequestError(
            f"tensor '{name}': {len(buffer) - offset} bytes follow the last string"
        )
    return strings


def _strings(array: Array, name: str) -> list[str]:
    items = array.ravel().tolist()
    if not all(type(item) is str for item in items):
        raise BadRequestError(f"tensor '{name}': an array of objects must hold only str")
    return items


def _out_of_range(name: str, datatype: Datatype) -> BadRequestError:
    return BadRequestError(f"tensor '{name}': a value is out of range for {datatype}")
