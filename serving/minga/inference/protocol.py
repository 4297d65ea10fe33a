"""Requests and responses of the Open Inference Protocol v2: bytes in, frozen values out, and back.

A body is JSON, or JSON followed by raw tensors (the binary tensor extension): then the header
`Inference-Header-Content-Length` says where the JSON ends, and `parameters.binary_data_size`
of each tensor how many of the bytes after it are its own, in the order of the list. Zero as
that header means a raw request: the body is the only input's bytes and all outputs are raw.

Which outputs come back raw is asked for per output (`parameters.binary_data`), or for all
(`parameters.binary_data_output`); the first wins.

Not here: whether names, shapes and datatypes fit a model (`engine`), and HTTP (`app`, `client`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as excerpt  # a caller must not choose a message's length
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import orjson

from minga.inference.errors import BadRequestError
from minga.inference.tensors import (
    Array,
    Datatype,
    TensorSpec,
    from_binary,
    from_json,
    parse_datatype,
    parse_shape,
    to_binary,
    to_json,
)

JSON_SIZE_HEADER: Final = "inference-header-content-length"
BINARY_EXTENSION: Final = "binary_tensor_data"
# An empty list is 3 bytes on the wire and 64 in memory; a row per list is a usual request.
_MAX_NESTED: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """An output that the caller named, and whether it wants raw bytes (None: not said)."""

    name: str
    binary: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """One inference request.

    Attributes:
        inputs: the tensors by name.
        outputs: what the caller asked for; empty means every output of the model.
        id: the caller's own name for the request, given back with the response.
        binary_outputs: whether outputs come back raw where the caller did not say per output.
        parameters: what else the caller said of the whole request.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[RequestedOutput, ...] = ()
    id: str | None = None
    binary_outputs: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, inputs: Mapping[str, npt.ArrayLike], outputs: Iterable[str] = (), **more: Any
    ) -> Self:
        """Make a request of anything that numpy takes as arrays, and of outputs' names."""
        return cls(
            inputs={name: np.asarray(array) for name, array in inputs.items()},
            outputs=tuple(RequestedOutput(name=name) for name in outputs),
            **more,
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs that the caller named."""
        return tuple(output.name for output in self.outputs)

    def wants_binary(self, output: str) -> bool:
        """Tell whether this output goes back as raw bytes."""
        for requested in self.outputs:
            if requested.name == output and requested.binary is not None:
                return requested.binary
        return self.binary_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    """One inference response: which version of which model gave which outputs."""

    model_name: str
    model_version: str
    outputs: Mapping[str, Array]
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A body on the wire.

    Attributes:
        body: JSON, or JSON followed by raw tensors.
        json_size: the length of the JSON part; None where the body is nothing but JSON.
    """

    body: bytes
    json_size: int | None = None


def decode_request(message: Message, *, raw_inputs: Sequence[TensorSpec] = ()) -> InferRequest:
    """Read a request.

    Args:
        message: the body as it came.
        raw_inputs: the model's inputs, by which a raw request is understood.

    Raises:
        BadRequestError: the body is not a request of the protocol.
    """
    if message.json_size == 0:
        return _raw_request(message.body, raw_inputs)
    root, tail = _split(message)
    parameters = _object(root, "parameters")
    inputs = _tensors(root.get("inputs"), tail, "inputs")
    if not inputs:
        raise BadRequestError("the request has no inputs")
    return InferRequest(
        inputs=inputs,
        outputs=_requested_outputs(root.get("outputs")),
        id=_optional_string(root, "id"),
        binary_outputs=_flag(parameters, "binary_data_output") or False,
        parameters=parameters,
    )


def encode_request(request: InferRequest, *, binary: bool) -> Message:
    """Write a request, its inputs as raw bytes or as JSON (FP16 has no JSON form)."""
    root: dict[str, Any] = {} if request.id is None else {"id": request.id}
    parameters = dict(request.parameters)
    if request.binary_outputs:
        parameters["binary_data_output"] = True
    if parameters:
        root["parameters"] = parameters
    if request.outputs:
        root["outputs"] = [
            {"name": output.name}
            | ({} if output.binary is None else {"parameters": {"binary_data": output.binary}})
            for output in request.outputs
        ]
    return _encode(root, "inputs", request.inputs, frozenset(request.inputs if binary else ()))


def encode_response(response: InferResponse, request: InferRequest) -> Message:
    """Write a response in the form that its request asked for.

    Raises:
        BadRequestError: JSON was asked for and cannot carry a value.
    """
    root: dict[str, Any] = {
        "model_name": response.model_name,
        "model_version": response.model_version,
    }
    if response.id is not None:
        root["id"] = response.id
    binary = frozenset(name for name in response.outputs if request.wants_binary(name))
    return _encode(root, "outputs", response.outputs, binary)


def decode_response(message: Message) -> InferResponse:
    """Read a response.

    Raises:
        BadRequestError: the body is not a response of the protocol.
    """
    root, tail = _split(message)
    return InferResponse(
        model_name=_string(root, "model_name"),
        model_version=_optional_string(root, "model_version") or "",
        outputs=_tensors(root.get("outputs"), tail, "outputs"),
        id=_optional_string(root, "id"),
    )


def _raw_request(body: bytes, specs: Sequence[TensorSpec]) -> InferRequest:
    """Read a body that is one tensor, whose one variable dimension follows from the size."""
    if len(specs) != 1:
        raise BadRequestError(
            f"a raw request needs a model with one input, this one has {len(specs)}"
        )
    spec = specs[0]
    variable = spec.shape.count(-1)
    if variable > 1 or (variable and spec.datatype is Datatype.BYTES):
        raise BadRequestError(
            f"a raw request does not tell the shape {list(spec.shape)} of '{spec.name}'; "
            "send the input with its shape"
        )
    item_bytes = math.prod(dim for dim in spec.shape if dim != -1) * spec.datatype.dtype.itemsize
    inferred = len(body) // item_bytes if item_bytes else 0
    shape = tuple(inferred if dim == -1 else dim for dim in spec.shape)
    array = from_binary(memoryview(body), datatype=spec.datatype, shape=shape, name=spec.name)
    return InferRequest(inputs={spec.name: array}, binary_outputs=True)


def _split(message: Message) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(message.body)
    size = len(view) if message.json_size is None else message.json_size
    if size > len(view):
        raise BadRequestError(
            f"{JSON_SIZE_HEADER} says {size} bytes of JSON, the body has {len(view)}"
        )
    if message.body.count(b"[", 0, size) + message.body.count(b"{", 0, size) > _MAX_NESTED:
        raise BadRequestError(
            f"the body has over {_MAX_NESTED} lists and objects; "
            "give data flat, or with the binary tensor extension"
        )
    try:
        root = orjson.loads(view[:size])
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if type(root) is not dict:
        raise BadRequestError(f"the body must be a JSON object, not {excerpt(root)}")
    return root, view[size:]


def _tensors(entries: object, tail: memoryview, field: str) -> dict[str, Array]:
    if type(entries) is not list:
        raise BadRequestError(f"'{field}' must be a list of tensors, not {excerpt(entries)}")
    tensors: dict[str, Array] = {}
    for entry in entries:
        name, array, used = _tensor(entry, tail, field)
        if name in tensors:
            raise BadRequestError(f"'{field}' names tensor '{name}' twice")
        tensors[name] = array
        tail = tail[used:]
    if len(tail):
        raise BadRequestError(f"{len(tail)} bytes follow the last binary tensor")
    return tensors


def _tensor(entry: object, tail: memoryview, field: str) -> tuple[str, Array, int]:
    """Read one tensor; also tell how many bytes of the tail were its own."""
    if type(entry) is not dict:
        raise BadRequestError(f"'{field}' must be a list of objects, got {excerpt(entry)}")
    name = _string(entry, "name")
    datatype = parse_datatype(entry.get("datatype"), name=name)
    shape = parse_shape(entry.get("shape"), name=name)
    size = _object(entry, "parameters").get("binary_data_size")
    if size is None:
        array = from_json(entry.get("data"), datatype=datatype, shape=shape, name=name)
        return name, array, 0
    if "data" in entry:
        raise BadRequestError(f"tensor '{name}' has both data and binary_data_size")
    if type(size) is not int or size < 0:
        raise BadRequestError(
            f"tensor '{name}': binary_data_size must be a count of bytes, not {excerpt(size)}"
        )
    if size > len(tail):
        raise BadRequestError(
            f"tensor '{name}' claims {size} binary bytes, {len(tail)} are left; "
            f"is the {JSON_SIZE_HEADER} header set?"
        )
    array = from_binary(tail[:size], datatype=datatype, shape=shape, name=name)
    return name, array, size


def _requested_outputs(entries: object) -> tuple[RequestedOutput, ...]:
    if entries is None:
        return ()
    if type(entries) is not list or not all(type(entry) is dict for entry in entries):
        raise BadRequestError(f"'outputs' must be a list of objects, not {excerpt(entries)}")
    outputs = tuple(
        RequestedOutput(
            name=_string(entry, "name"), binary=_flag(_object(entry, "parameters"), "binary_data")
        )
        for entry in entries
    )
    if len({output.name for output in outputs}) != len(outputs):
        raise BadRequestError("'outputs' names an output twice")
    return outputs


def _encode(
    root: dict[str, Any], field: str, tensors: Mapping[str, Array], binary: frozenset[str]
) -> Message:
    entries: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, array in tensors.items():
        entry: dict[str, Any] = {"name": name, "datatype": Datatype.of(array), "shape": array.shape}
        if name in binary:
            raw.append(to_binary(array, name=name))
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            entry["data"] = to_json(array, name=name)
        entries.append(entry)
    text = orjson.dumps(root | {field: entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raw:
        return Message(body=text)
    return Message(body=b"".join((text, *raw)), json_size=len(text))


def _object(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if type(value) is not dict:
        raise BadRequestError(f"'{key}' must be an object, not {excerpt(value)}")
    return value


def _string(parent: Mapping[str, Any], key: str) -> str:
    value = parent.get(key)
    if type(value) is not str or not value:
        raise BadRequestError(f"'{key}' must be a non-empty string, not {excerpt(value)}")
    return value


def _optional_string(parent: Mapping[str, Any], key: str) -> str | None:
    value = parent.get(key)
    if value is not None and type(value) is not str:
        raise BadRequestError(f"'{key}' must be a string, not {excerpt(value)}")
    return value


def _flag(parameters: Mapping[str, Any], key: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and type(value) is not bool:
        raise BadRequestError(f"'{key}' must be true or false, not {excerpt(value)}")
    return value
