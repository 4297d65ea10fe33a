"""The OpenAPI 3.1 description of what is served over HTTP, made from the table in `routes`.

`GET /openapi.json` gives it. Raw tensors, which follow the JSON in one body, have no schema in
OpenAPI; their requests and answers are described as bytes.
"""

from functools import cache
from typing import Any, Final

from minga.inference.protocol import JSON_SIZE_HEADER
from minga.inference.routes import ROUTES, Operation, Route
from minga.inference.service import server_version
from minga.inference.tensors import Datatype

_SUMMARIES: Final = {
    Operation.SERVER_METADATA: "Name, version and extensions of the server",
    Operation.SERVER_LIVE: "Whether the server runs",
    Operation.SERVER_READY: "Whether the server has models to answer with",
    Operation.MODEL_NAMES: "The names of the models that answer",
    Operation.MODEL_METADATA: "Versions, inputs and outputs of a model",
    Operation.MODEL_READY: "Whether a model answers",
    Operation.INFER: "Outputs of a model for inputs",
    Operation.EXPLAIN: "What each feature adds to a model's outputs, row by row",
    Operation.STATISTICS: "Counts and times of versions since they were loaded",
    Operation.REPOSITORY_INDEX: "The declared versions and their state",
    Operation.LOAD: "Let an unloaded model answer again",
    Operation.UNLOAD: "Let a model answer no more until it is loaded",
    Operation.METRICS: "Prometheus' series",
    Operation.DESCRIPTION: "This description",
}
_REFUSALS: Final[dict[Operation, tuple[int, ...]]] = {
    Operation.SERVER_READY: (503,),
    Operation.MODEL_METADATA: (404, 503),
    Operation.MODEL_READY: (404, 503),
    Operation.INFER: (400, 404, 408, 413, 415, 503),
    Operation.EXPLAIN: (400, 404, 408, 413, 415, 503),
    Operation.STATISTICS: (404, 503),
    Operation.REPOSITORY_INDEX: (400, 408, 413, 415, 503),
    Operation.LOAD: (400, 403, 404, 408, 413, 415, 503),
    Operation.UNLOAD: (400, 403, 404, 408, 413, 415, 503),
}
"""Which statuses an operation may refuse with, beside 405 for its method and 431 for headers."""
_KEPT_OUT: Final = (401, 403, 429)
"""With which statuses callers may be refused who need leave."""
_SECURITY: Final = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
_REASONS: Final = {
    400: "The request is malformed or does not fit the model",
    401: "The server wants an API key, and there is none that counts",
    403: "The server does not let its callers, or this key, do this",
    404: "There is no such model or version",
    408: "The body did not arrive in time",
    413: "The body is over the limit",
    415: "The body's content coding is neither gzip nor deflate",
    429: "The key has made its requests for now; Retry-After says when it may again",
    431: "The headers are over the limit",
    503: "Not now; the same request may succeed later",
}


@cache
def description(*, is_open: bool = True) -> dict[str, Any]:
    """Give the description as a JSON object; not to be changed.

    Args:
        is_open: the server lets everyone in; else callers need keys.
    """
    paths: dict[str, Any] = {}
    for route in ROUTES:
        if route.template != "/v2/":  # the same as /v2
            paths.setdefault(route.template, {})[route.method.lower()] = _operation(
                route, is_open=is_open
            )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Minga inference",
            "version": server_version(),
            "description": "The Open Inference Protocol v2 with Triton's statistics and model "
            "repository extensions.",
        },
        "paths": paths,
        "components": {"schemas": _schemas()} | ({} if is_open else _SECURITY),
    }


def _operation(route: Route, *, is_open: bool) -> dict[str, Any]:
    name = route.operation.name.lower()
    if "{version}" in route.template:
        name += "_of_version"
    elif route.template == "/v2/models/stats":
        name += "_of_all"
    parameters: list[dict[str, Any]] = [
        {"name": part, "in": "path", "required": True, "schema": {"type": "string"}}
        for part in ("model", "version")
        if f"{{{part}}}" in route.template
    ]
    responses: dict[str, Any] = {"200": _success(route.operation)}
    needs_leave = route.permission is not None and not is_open
    kept_out = _KEPT_OUT if needs_leave else ()
    for status in sorted({*_REFUSALS.get(route.operation, ()), *kept_out, 431}):
        responses[str(status)] = {"description": _REASONS[status], "content": _json("Error")}
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": _SUMMARIES[route.operation],
        "responses": responses,
    }
    if needs_leave:
        operation["security"] = [{"key": []}]
    if route.operation in (Operation.INFER, Operation.EXPLAIN):
        parameters.append(
            {
                "name": JSON_SIZE_HEADER,
                "in": "header",
                "required": False,
                "description": "Where the JSON ends and raw tensors begin",
                "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
            }
        )
    if parameters:
        operation["parameters"] = parameters
    if body := _body(route.operation):
        operation["requestBody"] = body
    return operation


def _body(operation: Operation) -> dict[str, Any] | None:
    match operation:
        case Operation.INFER | Operation.EXPLAIN:
            content = _json("InferRequest") | {"application/octet-stream": {}}
            return {"required": True, "content": content}
        case Operation.REPOSITORY_INDEX:
            return {"content": _json("RepositoryIndexRequest")}
        case Operation.LOAD | Operation.UNLOAD:
            return {"content": _json("Options")}
        case _:
            return None


def _success(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any]
    match operation:
        case Operation.INFER | Operation.EXPLAIN:
            content = _json("InferResponse") | {"application/octet-stream": {}}
        case Operation.METRICS:
            content = {"text/plain": {"schema": {"type": "string"}}}
        case Operation.DESCRIPTION | Operation.LOAD | Operation.UNLOAD:
            content = {"application/json": {"schema": {"type": "object"}}}
        case _:
            content = _json(_ANSWERS[operation])
    return {"description": _SUMMARIES[operation], "content": content}


_ANSWERS: Final = {
    Operation.SERVER_METADATA: "ServerMetadata",
    Operation.SERVER_LIVE: "Live",
    Operation.SERVER_READY: "Ready",
    Operation.MODEL_NAMES: "ModelNames",
    Operation.MODEL_METADATA: "ModelMetadata",
    Operation.MODEL_READY: "ModelReady",
    Operation.STATISTICS: "Statistics",
    Operation.REPOSITORY_INDEX: "RepositoryIndex",
}
_TEXT: Final = {"type": "string"}
_NAME: Final = {"type": "string", "minLength": 1}
_FLAG: Final = {"type": "boolean"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_PARAMETERS: Final = {"type": "object"}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": required | optional,
    }


def _list(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


def _ref(schema: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"}


def _schemas() -> dict[str, Any]:
    spec = _object(
        {"name": _NAME, "datatype": _ref("Datatype"), "shape": _list({"type": "integer"})}
    )
    durations = {
        name: _ref("Duration") for name in ("compute_input", "compute_infer", "compute_output")
    }
    requests = {name: _ref("Duration") for name in ("success", "fail", "queue")} | durations
    return {
        "Error": _object({"error": _NAME}),
        "Datatype": {"type": "string", "enum": list(Datatype)},
        "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
        "Live": _object({"live": _FLAG}),
        "Ready": _object({"ready": _FLAG}),
        "ModelNames": _object({"models": _list(_TEXT)}),
        "ModelReady": _object({"name": _TEXT, "ready": _FLAG}),
        "ModelMetadata": _object(
            {
                "name": _TEXT,
                "versions": _list(_TEXT),
                "platform": _TEXT,
                "inputs": _list(spec),
                "outputs": _list(spec),
            }
        ),
        **_infer_schemas(),
        "Duration": _object({"count": _COUNT, "ns": _COUNT}),
        "Statistics": _object(
            {
                "model_stats": _list(
                    _object(
                        {
                            "name": _TEXT,
                            "version": _TEXT,
                            "last_inference": _COUNT,
                            "inference_count": _COUNT,
                            "execution_count": _COUNT,
                            "inference_stats": _object(requests),
                            "batch_stats": _list(_object({"batch_size": _COUNT} | durations)),
                        }
                    )
                )
            }
        ),
        "RepositoryIndexRequest": _object({}, ready=_FLAG),
        "RepositoryIndex": _list(
            _object(
                {
                    "name": _TEXT,
                    "version": _TEXT,
                    "state": {"type": "string", "enum": ["READY", "UNAVAILABLE"]},
                    "reason": _TEXT,
                }
            )
        ),
        "Options": _object({}, parameters=_PARAMETERS | {"maxProperties": 0}),
    }


def _infer_schemas() -> dict[str, Any]:
    tensor = {"name": _NAME, "datatype": _ref("Datatype"), "shape": _list(_COUNT, maxItems=32)}
    content = {"data": _ref("Data"), "parameters": _PARAMETERS}
    requested = _object({"name": _NAME}, parameters=_object({}, binary_data=_FLAG))
    return {
        "Data": {
            "type": "array",
            "description": "Nested by the shape, or flat in row-major order",
            "items": {"type": ["number", "boolean", "string", "array"]},
        },
        "InferRequest": _object(
            {"inputs": _list(_object(tensor, **content), minItems=1)},
            id=_TEXT,
            parameters=_object(
                {}, binary_data_output=_FLAG, baseline=_list({"type": "number"}, minItems=1)
            ),
            outputs=_list(requested),
        ),
        "InferResponse": _object(
            {
                "model_name": _TEXT,
                "model_version": _TEXT,
                "outputs": _list(_object(tensor, **content)),
            },
            id=_TEXT,
        ),
    }
