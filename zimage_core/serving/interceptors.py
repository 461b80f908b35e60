"""What surrounds every call of ours: its id, its log line, its errors as statuses, its strictness.

One interceptor rebuilds each handler around the same few concerns, for unary calls and streams
alike. Health and reflection pass through untouched.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, Self, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from zimage_core import tracing
from zimage_core.errors import InternalError, InvalidRequest, Overloaded, Unimplemented, ZImageError
from zimage_core.serving import metrics, peer
from zimage_core.serving.access import Access, Caller, inside
from zimage_core.tracing import Span
from zimage_core.wire import request_id, status, strict

_log = logging.getLogger("zimage.rpc")
_OURS = "/zimage_rpc."
_OK = ((status.SERVED_BY_US, "ok"),)
_READER_SECONDS = 120.0
_PARTING_SECONDS = 0.3

M = TypeVar("M", bound=Message)

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for type checkers alone


class Around(grpc.aio.ServerInterceptor):
    """Wraps every handler of our own services, and lets in whom the tokens do."""

    def __init__(self, tokens: Access | None = None) -> None:
        self._tokens = tokens
        self._is_stopping = False

    def stop(self) -> None:
        """From now on connections end with their last call."""
        self._is_stopping = True

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
        caller = None
        if self._tokens:
            try:
                metadata = dict(handler_call_details.invocation_metadata or ())
                caller = self._tokens.caller(method, metadata)
            except ZImageError as error:  # as a stream, or gRPC would read the request first
                return grpc.stream_stream_rpc_method_handler(_refused(method, error))
        rebuilt, wrapped = (
            (grpc.unary_unary_rpc_method_handler, _unary(method, handler, caller))
            if handler.unary_unary is not None
            else (
                grpc.stream_stream_rpc_method_handler,
                _stream(method, handler, caller, self._part),
            )
        )
        return rebuilt(wrapped, response_serializer=handler.response_serializer)

    async def _part(self) -> None:
        """Answers get ahead of the status where that is the last of a connection: haproxy 2.6 drops
        it when it reads answers, status and the connection's end at once."""
        if self._is_stopping:
            await asyncio.sleep(_PARTING_SECONDS)


def _unary(method: str, handler: Any, caller: Caller | None) -> Any:
    async def wrapped(raw: bytes, context: _Context) -> Any:
        async with _Call(method, context, caller) as call:
            with inside(caller):
                return call.sent(await handler.unary_unary(call.read(raw, handler), context))

    return wrapped


def _stream(
    method: str, handler: Any, caller: Caller | None, part: Callable[[], Awaitable[None]]
) -> Any:
    async def wrapped(raws: AsyncIterator[bytes], context: _Context) -> None:
        async with _Call(method, context, caller) as call:
            with inside(caller):
                requests = (call.read(raw, handler) async for raw in raws)
                async with aclosing(handler.stream_stream(requests, context)) as answers:
                    async for answer in answers:
                        await _hand_over(call.sent(answer), context)
                await part()

    return wrapped


async def _hand_over(answer: Message, context: _Context) -> None:
    """Waits until the client takes the answer, but not for ever: what waits here takes memory."""
    try:
        async with asyncio.timeout(_READER_SECONDS):
            await context.write(answer)
    except TimeoutError:
        raise Overloaded(
            f"the client read nothing for {_READER_SECONDS:g} s; read the answers as they come",
            reason="SLOW_READER",
        ) from None


def _refused(method: str, error: ZImageError) -> Any:
    async def refuse(_raws: AsyncIterator[bytes], context: _Context) -> None:
        async with _Call(method, context):
            raise error

    return refuse


async def _unknown_method(_requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
    await _abort(context, Unimplemented("this server does not know the method"))
    yield


class _Call:
    """One call from its first byte to its status."""

    def __init__(self, method: str, context: _Context, caller: Caller | None = None) -> None:
        self._method = method
        self._context = context
        names = caller.token.name if caller else "", peer.name(context.auth_context())
        self._by = " at ".join(filter(None, names))
        self._label = method.rpartition(".")[2]
        self._began = time.monotonic()

    def read(self, raw: bytes, handler: Any) -> Message:
        """The request, decoded here and not by gRPC, so that bad bytes get a typed answer, too."""
        metrics.RPC_BYTES.labels(self._label, "in").inc(len(raw))
        try:
            request: Message = handler.request_deserializer(raw)
        except DecodeError as error:
            raise InvalidRequest("the bytes are no such message", reason="MALFORMED") from error
        strict.refuse_unknown(request)
        return request

    def sent(self, answer: M) -> M:
        """Counts an answer."""
        metrics.RPC_BYTES.labels(self._label, "out").inc(answer.ByteSize())
        return answer

    async def __aenter__(self) -> Self:
        metrics.RPC_STARTED.labels(self._label).inc()
        metrics.RPC_RUNNING.labels(self._label).inc()
        metadata = dict(self._context.invocation_metadata() or ())
        self._id = request_id.accept(str(metadata.get(request_id.KEY, "")))
        request_id.current.set(self._id)  # each call is a task of its own, with its own context
        self._span = Span(self._label, str(metadata.get(tracing.KEY, "")), "SERVER")
        tracing.current.set(self._span)
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object
    ) -> None:
        self._span.end(error)
        match error:
            case None:
                self._context.set_trailing_metadata(_OK)
                self._end("OK")
            case ZImageError():
                metrics.RPC_REFUSED.labels(self._label, error.reason).inc()
                self._end(status.code_of(error).name, f": {status.text_of(error)}")
                await _abort(self._context, error)
            case asyncio.CancelledError() | GeneratorExit():
                self._end("DEADLINE_EXCEEDED" if self._is_late() else "CANCELLED")
            case _:
                _log.error("%s failed", self._method, exc_info=error)
                self._end("INTERNAL")
                fields = {"request_id": self._id}
                await _abort(self._context, InternalError("internal error", fields=fields))

    def _is_late(self) -> bool:
        remaining = self._context.time_remaining()
        return remaining is not None and remaining <= 0

    def _end(self, code: str, text: str = "") -> None:
        seconds = time.monotonic() - self._began
        metrics.RPC_RUNNING.labels(self._label).dec()
        metrics.RPC_ENDED.labels(self._label, code).inc()
        metrics.RPC_SECONDS.labels(self._label).observe(seconds)
        is_question = self._method.endswith("/Describe") and code == "OK"  # asked all the time
        level = logging.DEBUG if is_question else logging.INFO
        caller = f" by {self._by}" if self._by else ""
        _log.log(level, "%s %s %.1f ms%s%s", self._method, code, seconds * 1e3, caller, text)


async def _abort(context: _Context, error: ZImageError) -> NoReturn:
    await context.abort(status.code_of(error), status.text_of(error), status.to_trailers(error))
