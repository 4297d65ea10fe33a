"""The Open Inference Protocol v2 over HTTP, as a plain ASGI application.

It needs no framework and hosts anywhere: uvicorn in this process (`server`), Ray Serve
(`minga.serving`), a device. Routing is a match on the path's parts. A request is computed on
the event loop where that is faster than a hop to a thread, else on a small pool.

Every answer that is no success is `{"error": "..."}`, which is where clients look for it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version as installed_version
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry

from minga.inference.bodies import DisconnectedError, Receive, decompress, read_body
from minga.inference.engine import PLATFORM, OnnxModel
from minga.inference.errors import (
    BadRequestError,
    HeadersTooLargeError,
    InferenceError,
    MethodNotAllowedError,
    UnavailableError,
    UnknownPathError,
)
from minga.inference.limits import Limits
from minga.inference.metrics import CONTENT_TYPE, InferenceMetrics
from minga.inference.protocol import (
    BINARY_EXTENSION,
    JSON_SIZE_HEADER,
    Message,
    decode_request,
    encode_response,
)
from minga.inference.repository import ModelRepository
from minga.inference.tensors import TensorSpec

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LOG: Final = logging.getLogger(__name__)
_MAX_HEADER_BYTES: Final = 64 * 1024
_CALLER_LEFT: Final = 499  # nginx' number for it; nobody receives it, only the metrics
# A hop to a thread and back costs about 0.1 ms; computing longer than this on the loop would
# be felt by the other connections.
_INLINE_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


class InferenceApp:
    """An ASGI application that answers for the models of a repository.

    Args:
        repository: the models; it may change at any time.
        limits: what callers are granted.
        registry: where the Prometheus series live; `GET /metrics` writes all of it.
    """

    def __init__(
        self,
        repository: ModelRepository,
        *,
        limits: Limits | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._repository = repository
        self._limits = limits or Limits()
        self._metrics = InferenceMetrics(repository, registry or CollectorRegistry())
        self._threads = ThreadPoolExecutor(self._limits.num_threads, "minga-inference")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's lifespan or one request."""
        match scope["type"]:
            case "http":
                await self._answer_http(scope, receive, send)
            case "lifespan":
                await self._follow_lifespan(receive, send)
            case _:  # the protocol has no websockets; closing before accepting refuses one
                await send({"type": "websocket.close", "code": 1003})

    async def _answer_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._route(scope, receive)
        except InferenceError as error:
            answer = _refusal(error)
        except DisconnectedError:
            return
        except Exception:  # noqa: BLE001 - a bug of ours must not close the caller's connection
            _LOG.exception("unexpected error on %s %s", scope["method"], scope["path"])
            answer = _json({"error": "internal error; the server's log has the details"}, 500)
        length = (b"content-length", str(len(answer.body)).encode())
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [*answer.headers, length],
            }
        )
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: Scope, receive: Receive) -> _Answer:
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > _MAX_HEADER_BYTES:
            raise HeadersTooLargeError(f"the headers are over {_MAX_HEADER_BYTES} bytes")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        match path.split("/")[1:]:
            case ["v2", "models", name, "infer"]:
                return await self._infer(scope, receive, name, None)
            case ["v2", "models", name, "versions", version, "infer"]:
                return await self._infer(scope, receive, name, version)
            case parts:
                return self._describe(scope, parts)

    def _describe(self, scope: Scope, parts: list[str]) -> _Answer:
        """Answer everything that only reads."""
        read: Callable[[], _Answer]
        match parts:
            case ["v2"] | ["v2", ""]:
                read = _server_metadata
            case ["v2", "health", "live"]:
                read = partial(_json, {"live": True})
            case ["v2", "health", "ready"]:
                read = self._server_ready
            case ["v2", "models"]:
                read = self._model_names
            case ["v2", "models", name]:
                read = partial(self._model_metadata, name, None)
            case ["v2", "models", name, "ready"]:
                read = partial(self._model_ready, name, None)
            case ["v2", "models", name, "versions", version]:
                read = partial(self._model_metadata, name, version)
            case ["v2", "models", name, "versions", version, "ready"]:
                read = partial(self._model_ready, name, version)
            case ["metrics"]:
                read = self._exposition
            case _:
                raise UnknownPathError(f"no path {scope['path']!r} in the Open Inference Protocol")
        _require_method(scope, "GET, HEAD")
        return read()

    async def _infer(
        self, scope: Scope, receive: Receive, name: str, version: str | None
    ) -> _Answer:
        _require_method(scope, "POST")
        start = time.perf_counter()
        model: OnnxModel | None = None
        status = 500
        self._metrics.begin()
        try:
            model = self._repository.get(name, version)
            answer = await self._compute(model, dict(scope["headers"]), receive)
            status = answer.status
        except InferenceError as error:
            status = error.status
            raise
        except (DisconnectedError, asyncio.CancelledError):
            status = _CALLER_LEFT
            raise
        finally:
            self._metrics.end(
                model=model.ref.name if model else "",
                version=model.ref.version if model else "",
                status=status,
                duration_s=time.perf_counter() - start,
            )
        return answer

    async def _compute(
        self, model: OnnxModel, headers: dict[bytes, bytes], receive: Receive
    ) -> _Answer:
        limit = self._limits.max_body_bytes
        body = await read_body(receive, announced=headers.get(b"content-length"), max_bytes=limit)
        coding = headers.get(b"content-encoding", b"")
        json_size = _json_size(headers)
        compute = partial(_infer, model, body, coding, json_size, limit)
        if not coding and model.estimate_s(len(body)) < _INLINE_S:
            return compute()
        return await asyncio.get_running_loop().run_in_executor(self._threads, compute)

    def _server_ready(self) -> _Answer:
        if not self._repository.is_ready:
            raise UnavailableError("no model is loaded yet; try again shortly")
        return _json({"ready": True})

    def _model_names(self) -> _Answer:
        return _json({"models": self._repository.names()})

    def _model_ready(self, name: str, version: str | None) -> _Answer:
        model = self._repository.get(name, version)
        return _json({"name": model.ref.name, "ready": True})

    def _model_metadata(self, name: str, version: str | None) -> _Answer:
        model = self._repository.get(name, version)
        return _json(
            {
                "name": name,
                "versions": self._repository.versions(name),
                "platform": PLATFORM,
                "inputs": [_spec(spec) for spec in model.inputs],
                "outputs": [_spec(spec) for spec in model.outputs],
            }
        )

    def _exposition(self) -> _Answer:
        return _Answer(200, self._metrics.exposition(), ((b"content-type", CONTENT_TYPE.encode()),))

    async def _follow_lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                self._threads.shutdown(wait=False)
                await send({"type": "lifespan.shutdown.complete"})
                return


def _infer(
    model: OnnxModel, body: bytes, coding: bytes, json_size: int | None, max_bytes: int
) -> _Answer:
    """Bytes in, bytes out; on whichever thread."""
    plain = decompress(body, coding, max_bytes=max_bytes)
    request = decode_request(Message(body=plain, json_size=json_size), raw_inputs=model.inputs)
    message = encode_response(model.infer(request), request)
    if message.json_size is None:
        return _Answer(200, message.body)
    return _Answer(
        200,
        message.body,
        (
            (b"content-type", b"application/octet-stream"),
            (JSON_SIZE_HEADER.encode(), str(message.json_size).encode()),
        ),
    )


def _json_size(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(JSON_SIZE_HEADER.encode())
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise BadRequestError(
            f"{JSON_SIZE_HEADER} must be a count of bytes, not {value[:40].decode('latin-1')!r}"
        )
    return int(value)


def _require_method(scope: Scope, allowed: str) -> None:
    if scope["method"] not in allowed.split(", "):
        raise MethodNotAllowedError(
            f"{scope['path']} answers {allowed}, not {scope['method']}", allowed=allowed
        )


@cache
def _server_metadata() -> _Answer:
    return _json(
        {
            "name": "minga",
            "version": installed_version("minga"),
            "extensions": [BINARY_EXTENSION],
        }
    )


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _json(content: dict[str, Any], status: int = 200) -> _Answer:
    return _Answer(status, orjson.dumps(content))


def _refusal(error: InferenceError) -> _Answer:
    answer = _json({"error": str(error)}, error.status)
    if isinstance(error, MethodNotAllowedError):
        allow = (b"allow", error.allowed.encode())
        return _Answer(answer.status, answer.body, (*answer.headers, allow))
    return answer
