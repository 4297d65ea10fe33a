"""The Open Inference Protocol v2 over HTTP, as a plain ASGI application.

It needs no framework and hosts anywhere: uvicorn in this process (`server`), Ray Serve
(`minga.serving`), a device. What it answers is the table in `routes`.

Every answer that is no success is `{"error": "..."}`, which is where clients look for it.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry

from minga.inference.access import Access
from minga.inference.bodies import (
    MOST_INFLATED,
    DisconnectedError,
    Receive,
    Share,
    compress,
    decompress,
    read_body,
)
from minga.inference.engine import PLATFORM, OnnxModel
from minga.inference.errors import (
    BadRequestError,
    HeadersTooLargeError,
    InferenceError,
    MethodNotAllowedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownPathError,
)
from minga.inference.limits import Limits
from minga.inference.metrics import CONTENT_TYPE
from minga.inference.monitor.observer import Observer
from minga.inference.openapi import description
from minga.inference.protocol import (
    JSON_SIZE_HEADER,
    InferRequest,
    InferResponse,
    Message,
    decode_request,
    encode_response,
)
from minga.inference.repository import ModelRepository
from minga.inference.routes import Match, Operation, find
from minga.inference.service import (
    EXTENSIONS,
    SERVER_NAME,
    InferenceService,
    ModelControl,
    server_version,
)
from minga.inference.tensors import TensorSpec

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LOG: Final = logging.getLogger(__name__)
_MAX_HEADER_BYTES: Final = 64 * 1024
_MAX_OPTIONS_BYTES: Final = 1024 * 1024  # of what is no tensor, and read on the event loop
_BUFFERED_BYTES: Final = 64 * 1024  # what a server's own buffer takes without waiting
_JSON: Final = (b"content-type", b"application/json")
_BINARY: Final = (b"content-type", b"application/octet-stream")


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)


class InferenceApp:
    """An ASGI application that answers for the models of a repository.

    Args:
        repository: the models; it may change at any time.
        limits: what callers are granted.
        registry: where the Prometheus series live; `GET /metrics` writes all of it.
        control: see `InferenceService`.
        observer: see `InferenceService`.
        access: who is let in; by default everyone.
        exposition: writes what `GET /metrics` answers instead, where this process is one of
            several of which each tells of all.
    """

    def __init__(
        self,
        repository: ModelRepository,
        *,
        limits: Limits | None = None,
        registry: CollectorRegistry | None = None,
        control: ModelControl | None = None,
        access: Access | None = None,
        observer: Observer | None = None,
        exposition: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        self._exposition = exposition
        self.service = InferenceService(
            repository,
            limits=limits,
            registry=registry,
            control=control,
            access=access,
            observer=observer,
        )

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
        with self.service.share() as share:
            answer = await self._answer(scope, receive, share)
            if answer is None:
                return
            length = (b"content-length", str(len(answer.body)).encode())
            head = {"type": "http.response.start", "status": answer.status}
            await send(head | {"headers": [*answer.headers, length]})
            body = b"" if scope["method"] == "HEAD" else answer.body
            if len(body) <= _BUFFERED_BYTES:
                await send({"type": "http.response.body", "body": body})
                return
            # The second message waits until the caller has taken the first; until then its
            # memory is the request's share, so that callers who do not read cannot take it all.
            await send({"type": "http.response.body", "body": body, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(self.service.limits.body_timeout_s):
                    await send({"type": "http.response.body", "body": b""})

    async def _answer(self, scope: Scope, receive: Receive, share: Share) -> _Answer | None:
        """Answer one request; None if its caller went away."""
        try:
            answer = await self._route(scope, receive, share)
            share.take(len(answer.body))
        except InferenceError as error:
            return _refusal(error)
        except DisconnectedError:
            return None
        except Exception:  # noqa: BLE001 - a bug of ours must not close the caller's connection
            _LOG.exception("unexpected error on %s %s", scope["method"], scope["path"])
            return _json({"error": "internal error; the server's log has the details"}, 500)
        return answer

    async def _route(self, scope: Scope, receive: Receive, share: Share) -> _Answer:
        fields = scope["headers"]
        if sum(len(name) + len(value) for name, value in fields) > _MAX_HEADER_BYTES:
            raise HeadersTooLargeError(f"the headers are over {_MAX_HEADER_BYTES} bytes")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        match = find(path)
        if match is None:
            raise UnknownPathError(f"there is no {path[:80]!r} here; the protocol begins at /v2")
        if scope["method"] not in match.route.methods:
            raise MethodNotAllowedError(
                f"{path[:80]} answers {match.route.allowed}, not {scope['method'][:20]}",
                allowed=match.route.allowed,
            )
        headers = dict(fields)
        if match.route.permission is not None:
            self.service.access.admit(
                match.route.permission,
                headers.get(b"authorization", b"").decode("latin-1"),
                certified="tls" in scope.get("extensions", ()),
            )
        if match.route.method == "GET":
            return await self._describe(match)
        call = _HttpCall(headers, receive, share, self.service.beside)
        if match.route.operation is Operation.INFER:
            assert match.model is not None, "the path names it"
            return await self.service.infer(match.model, match.version, call)
        if match.route.operation is Operation.EXPLAIN:
            assert match.model is not None, "the path names it"
            return await self.service.explain(match.model, match.version, call)
        if match.route.operation is Operation.OUTCOMES:
            assert match.model is not None, "the path names it"
            return await self._count_outcomes(match.model, call)
        return await self._manage(match, call)

    async def _describe(self, match: Match) -> _Answer:
        """Answer what only reads."""
        match match.route.operation:
            case Operation.SERVER_METADATA:
                return _json(
                    {"name": SERVER_NAME, "version": server_version(), "extensions": EXTENSIONS}
                )
            case Operation.SERVER_LIVE:
                return _json({"live": True})
            case Operation.SERVER_READY:
                self.service.require_ready()
                return _json({"ready": True})
            case Operation.MODEL_NAMES:
                return _json({"models": self.service.repository.names()})
            case Operation.STATISTICS:
                return _json({"model_stats": self.service.statistics(match.model, match.version)})
            case Operation.METRICS:
                own = self.service.metrics.exposition
                text = await self._exposition() if self._exposition else own()
                return _Answer(200, text, ((b"content-type", CONTENT_TYPE.encode()),))
            case Operation.DESCRIPTION:
                return _json(description(is_open=self.service.access.is_open))
        assert match.model is not None, "the path names it"
        if match.route.operation is Operation.MODEL_READY:
            self.service.repository.find(match.model, match.version)
            return _json({"name": match.model, "ready": True})
        return _json(self._model_metadata(await self.service.model(match.model, match.version)))

    def _model_metadata(self, model: OnnxModel) -> dict[str, Any]:
        return {
            "name": model.ref.name,
            "versions": self.service.repository.versions(model.ref.name),
            "platform": PLATFORM,
            "inputs": [_spec(spec) for spec in model.inputs],
            "outputs": [_spec(spec) for spec in model.outputs],
        }

    async def _manage(self, match: Match, call: "_HttpCall") -> _Answer:
        """Answer for the repository."""
        options = await self._options(call)
        if match.route.operation is Operation.REPOSITORY_INDEX:
            only_ready = options.get("ready", False)
            if type(only_ready) is not bool:
                raise BadRequestError("'ready' must be true or false")
            return _json(self.service.index(only_ready=only_ready))
        assert match.model is not None, "the path names it"
        if match.route.operation is Operation.LOAD:
            if options.get("parameters"):
                raise BadRequestError("a model is loaded as it is declared; it takes no parameters")
            await self.service.load(match.model)
        else:
            await self.service.unload(match.model)
        return _json({})

    async def _count_outcomes(self, model: str, call: "_HttpCall") -> _Answer:
        entries = (await self._options(call)).get("outcomes")
        if type(entries) is not list or not all(map(_is_outcome, entries)):
            raise BadRequestError(
                '\'outcomes\' must be a list of {"key": text, "value": finite number}'
            )
        outcomes = [(entry["key"], float(entry["value"])) for entry in entries]
        return _json({"counted": self.service.report_outcomes(model, outcomes)})

    async def _options(self, call: "_HttpCall") -> dict[str, Any]:
        """Read a body that may be absent, and is a JSON object else."""
        limits = self.service.limits
        shortest = min(limits.max_body_bytes, _MAX_OPTIONS_BYTES)
        await call.receive(replace(limits, max_body_bytes=shortest))
        try:
            options = orjson.loads(call.body or b"{}")
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"the body is not JSON: {error}") from None
        if type(options) is not dict:
            raise BadRequestError("the body must be a JSON object")
        return options

    async def _follow_lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                self.service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


class _HttpCall:
    """An inference request over HTTP, a `service.Call`."""

    def __init__(
        self,
        headers: dict[bytes, bytes],
        receive: Receive,
        share: Share,
        beside: Callable[..., Awaitable[bytes]],
    ) -> None:
        self._headers = headers
        self._share = share
        self._receive = receive
        self._beside = beside
        self.body = b""

    async def receive(self, limits: Limits) -> int:
        """Read the body and undo its content coding; what it inflates to counts as well."""
        announced = self._headers.get(b"content-length")
        body = await read_body(self._receive, announced=announced, limits=limits, share=self._share)
        if coding := self._headers.get(b"content-encoding"):
            inflate = partial(decompress, max_bytes=limits.max_body_bytes)
            body = await self._beside(len(body) * MOST_INFLATED, inflate, body, coding)
            self._share.take(len(body))
        self.body = body
        return len(body)

    def decode(self, model: OnnxModel) -> InferRequest:
        """Read JSON, and raw tensors after it."""
        message = Message(body=self.body, json_size=_json_size(self._headers))
        return decode_request(message, raw_inputs=model.inputs)

    def header(self, name: str) -> str | None:
        """Give a header."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    def encode(self, response: InferResponse, request: InferRequest) -> _Answer:
        """Write JSON, and raw tensors after it."""
        message = encode_response(response, request)
        headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)
        if message.json_size is not None:
            headers = (_BINARY, (JSON_SIZE_HEADER.encode(), str(message.json_size).encode()))
        body, coding = compress(message.body, self._headers.get(b"accept-encoding", b""))
        if coding:
            headers = (*headers, (b"content-encoding", coding), (b"vary", b"accept-encoding"))
        return _Answer(200, body, headers)


def _json_size(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(JSON_SIZE_HEADER.encode())
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise BadRequestError(
            f"{JSON_SIZE_HEADER} must be a count of bytes, not {value[:40].decode('latin-1')!r}"
        )
    return int(value)


def _is_outcome(entry: object) -> bool:
    if type(entry) is not dict or entry.keys() != {"key", "value"}:
        return False
    key, value = entry["key"], entry["value"]
    return type(key) is str and type(value) in (int, float)


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _json(content: Any, status: int = 200) -> _Answer:
    return _Answer(status, orjson.dumps(content))


def _refusal(error: InferenceError) -> _Answer:
    answer = _json({"error": str(error)}, error.status)
    if isinstance(error, MethodNotAllowedError):
        return _Answer(answer.status, answer.body, (_JSON, (b"allow", error.allowed.encode())))
    if isinstance(error, UnavailableError):
        seconds = str(max(1, math.ceil(error.retry_after_s))).encode()
        return _Answer(answer.status, answer.body, (_JSON, (b"retry-after", seconds)))
    if isinstance(error, UnauthenticatedError):
        challenge = (b"www-authenticate", b'Bearer realm="minga"')
        return _Answer(answer.status, answer.body, (_JSON, challenge))
    return answer
