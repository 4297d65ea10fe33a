"""Code that runs around every call of a gRPC server, written once for all four kinds of call."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Final, TypeAlias

import grpc

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
    behaviour: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
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
