"""The blob service, wherever a service keeps blobs."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc.aio

from zimage_core.errors import InvalidRequest, NotFound, Unavailable
from zimage_core.store.blobs import Blobs
from zimage_core.store.incoming import Incoming
from zimage_core.wire.limits import CHUNK_BYTES, DIGESTS_PER_FIND
from zimage_rpc.blob.v1 import blob_pb2, blob_pb2_grpc

_log = logging.getLogger(__name__)

_THREADS = 4
_LOAD_SECONDS = 5.0
_MOST_KEEPING_BYTES = 64 << 20
_SILENT_SECONDS = 60.0
"""Longest wait for a client's next message: a silent one would hold up a drain."""

T = TypeVar("T")
_Context = grpc.aio.ServicerContext[Any, Any]


class BlobServicer(blob_pb2_grpc.BlobServiceServicer):
    """Disks are waited for in threads of its own: those of pictures are not kept waiting."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._keeping_bytes = 0
        """What waits to be kept; only the loop counts."""

    async def Find(  # noqa: N802 - gRPC's name
        self, request: blob_pb2.FindRequest, context: _Context
    ) -> blob_pb2.FindResponse:
        """What is there."""
        count = len(request.sha256)
        if count > DIGESTS_PER_FIND:
            allowed = f"{DIGESTS_PER_FIND} at most"
            raise InvalidRequest.given("sha256", f"{count} digests", allowed, "DIGEST_COUNT")
        every = await self._in_thread(lambda: [self._blobs.find(one) for one in request.sha256])
        answer = blob_pb2.FindResponse()
        for sha256, found in zip(request.sha256, every, strict=True):
            answer.found.add(
                sha256=sha256, complete=found.complete, stored_bytes=found.stored_bytes
            )
        return answer

    async def Put(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[blob_pb2.PutRequest], context: _Context
    ) -> AsyncIterator[blob_pb2.PutResponse]:
        """Takes a blob in, from where it ended."""
        first = await _next(request_iterator)
        if first is None or first.WhichOneof("payload") != "start":
            raise _wrong_order("PutRequest", "no start in the first", "start, then chunks")
        start = first.start
        async with self._receiving(start) as incoming:
            if incoming is not None:
                if incoming.stored_bytes < start.size_bytes:
                    yield blob_pb2.PutResponse(stored_bytes=incoming.stored_bytes)
                    async for chunk in _chunks(request_iterator):
                        await self._in_thread(lambda chunk=chunk: incoming.add(chunk))  # type: ignore[misc]
                await self._in_thread(lambda: self._blobs.complete(start.sha256, incoming))
        yield blob_pb2.PutResponse(stored_bytes=start.size_bytes, complete=True)
        async for _ in _chunks(request_iterator):
            pass  # to its end: some proxies cut a stream that ends at one side first

    async def Get(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[blob_pb2.GetRequest], context: _Context
    ) -> AsyncIterator[blob_pb2.GetResponse]:
        """Hands a blob out, from an offset on."""
        request, second = await _next(request_iterator), await _next(request_iterator)
        if request is None or second is not None:
            given = "a second one" if request else "none"
            raise _wrong_order("GetRequest", given, "one, then the end")
        file = await self._in_thread(lambda: self._blobs.open(request.sha256))
        try:
            size = await self._in_thread(lambda: file.seek(0, 2))
            if not 0 <= request.offset <= size:
                raise InvalidRequest.given("offset", request.offset, f"0 to {size}", "OFFSET")
            await self._in_thread(lambda: file.seek(request.offset))
            is_first = True
            while (chunk := await self._in_thread(lambda: file.read(CHUNK_BYTES))) or is_first:
                yield blob_pb2.GetResponse(size_bytes=size, chunk=chunk)
                is_first = False
        finally:
            self._threads.submit(file.close)

    async def load(self, sha256: str, size_bytes: int) -> bytes | None:
        """A small blob, whole and what its digest says; None where the store has none, or does not
        answer soon."""

        def read() -> bytes | None:
            with self._blobs.open(sha256) as file:
                data = file.read(size_bytes + 1)
            if len(data) != size_bytes:
                return None
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            self._blobs.discard(sha256)  # the disk has changed it: room for one that is right
            return None

        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                return await self._in_thread(read)
        except NotFound:
            return None
        except (Unavailable, OSError) as error:  # a TimeoutError is one, too
            _log.warning("blob %s is asked for once more: %r", sha256, error)
            return None

    def keep(self, sha256: str, data: bytes) -> None:
        """Puts a small blob on the shelf, soon, if there is room and the disk keeps up: nobody
        waits for it."""

        def write() -> None:
            try:
                self._blobs.keep(sha256, data)
            except Exception as error:  # noqa: BLE001 - nobody else would ever hear of it
                _log.warning("blob %s is not kept: %s", sha256, error)

        def kept(_done: object) -> None:
            self._keeping_bytes -= len(data)

        if self._keeping_bytes + len(data) <= _MOST_KEEPING_BYTES:
            self._keeping_bytes += len(data)
            keeping = asyncio.get_running_loop().run_in_executor(self._keeper, write)
            keeping.add_done_callback(kept)

    @asynccontextmanager
    async def _receiving(self, start: blob_pb2.PutStart) -> AsyncGenerator[Incoming | None, None]:
        """Closed in any case, also when the caller goes while a thread still opens it."""
        opening = self._threads.submit(self._blobs.receive, start.sha256, start.size_bytes)
        try:
            yield await asyncio.shield(asyncio.wrap_future(opening))
        finally:
            opening.add_done_callback(lambda _done: self._threads.submit(_close, opening))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _close(opening: Any) -> None:
    if not opening.exception() and (incoming := opening.result()):
        incoming.close()


async def _next(requests: AsyncIterator[T]) -> T | None:
    try:
        async with asyncio.timeout(_SILENT_SECONDS):
            return await anext(requests, None)
    except TimeoutError:
        given = f"nothing for {_SILENT_SECONDS:g} s"
        raise _wrong_order("messages", given, "the next, or the end") from None


async def _chunks(requests: AsyncIterator[blob_pb2.PutRequest]) -> AsyncIterator[bytes]:
    while (request := await _next(requests)) is not None:
        if request.WhichOneof("payload") != "chunk":
            raise _wrong_order("PutRequest", "no chunk after the start", "chunks")
        size = len(request.chunk)
        if size > CHUNK_BYTES:
            allowed = f"{CHUNK_BYTES} at most"
            raise InvalidRequest.given("chunk", f"{size} bytes", allowed, "CHUNK_SIZE")
        yield request.chunk


def _wrong_order(field: str, given: str, allowed: str) -> InvalidRequest:
    return InvalidRequest.given(field, given, allowed, "GRAMMAR")
