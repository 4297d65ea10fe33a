"""Code that runs around every call of a gRPC server, written once for all four kinds of call.

Bytes that are no message: gRPC itself would answer a call with them as if the server had failed,
and break a stream. Here they are refused like any other message that makes no sense.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from minga.federation.errors import PeerError

Context = grpc.aio.ServicerContext[Any, Any]
# In quotes: the class takes type parameters in its stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Guard = Callable[[Context], AbstractAsyncContextManager[None]]
"""Entered before a call's handler and left after it; it may refuse by raising."""

_MAKERS: Final[dict[tuple[bool, bool], Callable[..., Handler]]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def around(handler: Handler, guard: Guard) -> Handler:
    """Put a guard around a handler, which must be a coroutine or an asynchronous generator."""
    behaviour = _behaviour_of(handler)
    # gRPC drives the two kinds of streaming handler differently and tells them by their type.
    wrap = _generator if inspect.isasyncgenfunction(behaviour) else _coroutine
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    return make(wrap(behaviour, guard), handler.request_deserializer, handler.response_serializer)


def _coroutine(
    behaviour: Callable[[Any, Context], Awaitable[Any]], guard: Guard
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        async with guard(context):
            return await behaviour(request, context)

    return guarded


def _generator(
    behaviour: Callable[[Any, Context], Any], guard: Guard
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        async with guard(context), aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return guarded


def reading_anything(handler: Handler) -> Handler:
    """Let a handler get what it can read, whatever bytes come.

    A call with a single request is refused with `PeerError` if that cannot be read. A handler of a
    stream gets None in the place of a message that cannot be read, as gRPC's own clients do, and
    decides what becomes of the stream.
    """
    behaviour = _behaviour_of(handler)
    read = _reader(handler.request_deserializer)
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    if not handler.request_streaming:
        wrap = _readable_generator if inspect.isasyncgenfunction(behaviour) else _readable_coroutine
        behaviour = wrap(behaviour)
    return make(behaviour, read, handler.response_serializer)


def _behaviour_of(handler: Handler) -> Any:
    return (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None  # the handler takes bytes as they are

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return None

    return read


def _require_read(request: Any) -> None:
    if request is None:
        raise PeerError("the request cannot be read: it is no message of this service")


def _readable_coroutine(
    behaviour: Callable[[Any, Context], Awaitable[Any]],
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def checked(request: Any, context: Context) -> Any:
        _require_read(request)
        return await behaviour(request, context)

    return checked


def _readable_generator(
    behaviour: Callable[[Any, Context], Any],
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def checked(request: Any, context: Context) -> AsyncIterator[Any]:
        _require_read(request)
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return checked
