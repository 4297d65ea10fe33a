"""Messages of the Open Inference Protocol v2 over gRPC: into values of `protocol`, and back.

Tensors come raw (`raw_input_contents`, little-endian and row-major as over HTTP) or in the typed
lists of `InferTensorContents`; a request keeps to one of the two. They go back raw, which every
client reads; typed lists are slower, and tritonclient does not read them.

One table says which gRPC status an error is; both sides use it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc
import numpy as np

from minga.inference.errors import BadRequestError, InferenceError
from minga.inference.protocol import InferRequest, InferResponse, RequestedOutput
from minga.inference.tensors import (
    Array,
    Datatype,
    from_binary,
    parse_datatype,
    parse_shape,
    to_binary,
)
from minga.inference.v2 import open_inference_pb2 as pb

SERVICE: Final = "inference.GRPCInferenceService"
OUTCOMES: Final = "inference.OutcomeService"
EXPLANATIONS: Final = "inference.ExplanationService"
"""Minga's own services beside the protocol's."""
STATUSES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,  # the later one of a status is its HTTP status
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""HTTP status -> gRPC status."""
STATUS_KEY: Final = "minga-status"
"""The trailer of an error that says its HTTP status, of which gRPC's is a rougher form."""

_FIELDS: Final = {
    Datatype.BOOL: ("bool_contents", np.bool_),
    Datatype.INT8: ("int_contents", np.int32),
    Datatype.INT16: ("int_contents", np.int32),
    Datatype.INT32: ("int_contents", np.int32),
    Datatype.INT64: ("int64_contents", np.int64),
    Datatype.UINT8: ("uint_contents", np.uint32),
    Datatype.UINT16: ("uint_contents", np.uint32),
    Datatype.UINT32: ("uint_contents", np.uint32),
    Datatype.UINT64: ("uint64_contents", np.uint64),
    Datatype.FP32: ("fp32_contents", np.float32),
    Datatype.FP64: ("fp64_contents", np.float64),
    Datatype.BYTES: ("bytes_contents", np.object_),
}
"""Where a datatype's elements are in `InferTensorContents`, and their type there."""


def status_of(error: InferenceError) -> grpc.StatusCode:
    """Name the gRPC status of an error."""
    return STATUSES.get(error.status, grpc.StatusCode.INTERNAL)


def read_request(message: pb.ModelInferRequest) -> InferRequest:
    """Read a request.

    Raises:
        BadRequestError: it is no request of the protocol.
    """
    raw = message.raw_input_contents
    if not message.inputs:
        raise BadRequestError("the request has no inputs")
    if raw and len(raw) != len(message.inputs):
        raise BadRequestError(
            f"the request has {len(message.inputs)} inputs, and {len(raw)} raw contents"
        )
    contents: Sequence[bytes | None] = raw or [None] * len(message.inputs)
    inputs: dict[str, Array] = {}
    for tensor, content in zip(message.inputs, contents, strict=True):
        if tensor.name in inputs:
            raise BadRequestError(f"'inputs' names tensor {tensor.name[:80]!r} twice")
        inputs[tensor.name] = _read_tensor(tensor, content)
    outputs = tuple(RequestedOutput(name=output.name) for output in message.outputs)
    if len({output.name for output in outputs}) != len(outputs):
        raise BadRequestError("'outputs' names an output twice")
    return InferRequest(inputs=inputs, outputs=outputs, id=message.id or None, binary_outputs=True)


def write_request(model: str, version: str | None, request: InferRequest) -> pb.ModelInferRequest:
    """Write a request with raw tensors.

    Raises:
        BadRequestError: an array has no form in the protocol.
    """
    message = pb.ModelInferRequest(
        model_name=model, model_version=version or "", id=request.id or ""
    )
    for name, array in request.inputs.items():
        message.inputs.add(name=name, datatype=Datatype.of(array), shape=array.shape)
        message.raw_input_contents.append(to_binary(array, name=name))
    for output in request.outputs:
        message.outputs.add(name=output.name)
    return message


def write_response(response: InferResponse) -> pb.ModelInferResponse:
    """Write a response with raw tensors.

    Raises:
        BadRequestError: an array has no form in the protocol.
    """
    message = pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id or "",
    )
    for name, array in response.outputs.items():
        message.outputs.add(name=name, datatype=Datatype.of(array), shape=array.shape)
        message.raw_output_contents.append(to_binary(array, name=name))
    return message


def read_response(message: pb.ModelInferResponse) -> InferResponse:
    """Read a response; typed contents are read too, as other servers send them.

    Raises:
        BadRequestError: it is no response of the protocol.
    """
    raw = message.raw_output_contents
    if raw and len(raw) != len(message.outputs):
        raise BadRequestError(f"{len(message.outputs)} outputs have {len(raw)} raw contents")
    contents: Sequence[bytes | None] = raw or [None] * len(message.outputs)
    return InferResponse(
        model_name=message.model_name,
        model_version=message.model_version,
        outputs={
            tensor.name: _read_tensor(tensor, content)
            for tensor, content in zip(message.outputs, contents, strict=True)
        },
        id=message.id or None,
    )


def write_statistics(entries: Sequence[Mapping[str, Any]]) -> pb.ModelStatisticsResponse:
    """Write statistics, whose fields are named as the message's."""
    response = pb.ModelStatisticsResponse()
    for entry in entries:
        response.model_stats.add(
            name=entry["name"],
            version=entry["version"],
            last_inference=entry["last_inference"],
            inference_count=entry["inference_count"],
            execution_count=entry["execution_count"],
            inference_stats=_durations(pb.InferStatistics, entry["inference_stats"]),
            batch_stats=[
                _durations(pb.InferBatchStatistics, batch) for batch in entry["batch_stats"]
            ],
        )
    return response


def _durations(kind: Any, fields: Mapping[str, Any]) -> Any:
    return kind(
        **{
            name: pb.StatisticDuration(**value) if isinstance(value, Mapping) else value
            for name, value in fields.items()
        }
    )


def _read_tensor(tensor: Any, content: bytes | None) -> Array:
    name = tensor.name
    if not name:
        raise BadRequestError("a tensor has no name")
    shown = name[:80]
    datatype = parse_datatype(tensor.datatype, name=shown)
    shape = parse_shape(list(tensor.shape), name=shown)
    if content is None:
        return _read_typed(tensor.contents, datatype, shape, shown)
    if tensor.HasField("contents"):
        raise BadRequestError(f"tensor '{shown}' has both typed and raw contents")
    return from_binary(memoryview(content), datatype=datatype, shape=shape, name=shown)


def _read_typed(
    contents: pb.InferTensorContents, datatype: Datatype, shape: tuple[int, ...], name: str
) -> Array:
    if datatype not in _FIELDS:
        raise BadRequestError(f"tensor '{name}': {datatype} has no typed form; send it raw")
    field, listed = _FIELDS[datatype]
    strange = [
        descriptor.name for descriptor, _ in contents.ListFields() if descriptor.name != field
    ]
    if strange:
        raise BadRequestError(f"tensor '{name}': {datatype} goes into {field}, not {strange[0]}")
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        raise BadRequestError(
            f"tensor '{name}': {len(values)} elements do not fill shape {list(shape)}"
        )
    if datatype is Datatype.BYTES:
        return _strings(values, name).reshape(shape)
    wide: Array = np.array(values, dtype=listed)
    if len(values) and datatype.dtype.kind in "iu":
        bounds = np.iinfo(datatype.dtype)
        if wide.min() < bounds.min or wide.max() > bounds.max:
            raise BadRequestError(f"tensor '{name}': a value is out of range for {datatype}")
    return wide.astype(datatype.dtype).reshape(shape)


def _strings(values: Sequence[bytes], name: str) -> Array:
    array = np.empty(len(values), dtype=object)
    try:
        array[:] = [value.decode() for value in values]
    except UnicodeDecodeError:
        raise BadRequestError(f"tensor '{name}': a string is not UTF-8") from None
    return array
