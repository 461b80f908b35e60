"""What surrounds every call of ours: its id, its log line, its errors as statuses, its strictness.

One interceptor rebuilds each handler around the same few concerns, for unary calls and streams
alike. Health and reflection pass through untouched.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from zimage_core.errors import InternalError, Unimplemented, ZImageError
from zimage_core.wire import request_id, status, strict

_log = logging.getLogger("zimage.rpc")
_OURS = "/zimage_rpc."
_OK = ((status.SERVED_BY_US, "ok"),)

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for type checkers alone


class Around(grpc.aio.ServerInterceptor):
    """Wraps every handler of our own services."""

    async def intercept_service(  # type: ignore[override]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Called by gRPC before a byte of the request's body is read."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_unknown_method)
        if not method.startswith(_OURS):
            return handler  # type: ignore[no-any-return]
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(method, handler.unary_unary), **coders
            )
        return grpc.stream_stream_rpc_method_handler(
            _stream(method, handler.stream_stream), **coders
        )


def _unary(method: str, behaviour: Callable[[Any, _Context], Awaitable[Any]]) -> Any:
    async def wrapped(request: Any, context: _Context) -> Any:
        async with _Call(method, context):
            strict.refuse_unknown(request)
            return await behaviour(request, context)

    return wrapped


def _stream(method: str, behaviour: Callable[[Any, _Context], AsyncIterator[Any]]) -> Any:
    async def wrapped(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
        async with _Call(method, context):
            async for answer in behaviour(_checked(requests), context):
                yield answer

    return wrapped


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        strict.refuse_unknown(request)
        yield request


async def _unknown_method(_requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
    await _abort(context, Unimplemented("this server does not know the method"))
    yield


class _Call:
    """One call from its first byte to its status."""

    def __init__(self, method: str, context: _Context) -> None:
        self._method = method
        self._context = context
        self._began = time.monotonic()

    async def __aenter__(self) -> None:
        metadata = dict(self._context.invocation_metadata() or ())
        self._id = request_id.accept(str(metadata.get(request_id.KEY, "")))
        request_id.current.set(self._id)  # each call is a task of its own, with its own context

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object
    ) -> None:
        match error:
            case None:
                self._context.set_trailing_metadata(_OK)
                self._log("OK")
            case ZImageError():
                self._log(status.code_of(error).name, f": {error.message}")
                await _abort(self._context, error)
            case asyncio.CancelledError() | GeneratorExit():
                self._log("CANCELLED")
            case _:
                _log.error("%s failed", self._method, exc_info=error)
                self._log("INTERNAL")
                fields = {"request_id": self._id}
                await _abort(self._context, InternalError("internal error", fields=fields))

    def _log(self, code: str, text: str = "") -> None:
        milliseconds = (time.monotonic() - self._began) * 1e3
        _log.info("%s %s %.1f ms%s", self._method, code, milliseconds, text)


async def _abort(context: _Context, error: ZImageError) -> NoReturn:
    await context.abort(status.code_of(error), error.message, status.to_trailers(error))
