"""The blob service, wherever a service keeps blobs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import grpc.aio

from zimage_core.errors import InvalidRequest
from zimage_core.store.blobs import Blobs, Incoming
from zimage_core.wire.limits import CHUNK_BYTES, DIGESTS_PER_FIND
from zimage_rpc.blob.v1 import blob_pb2, blob_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class BlobServicer(blob_pb2_grpc.BlobServiceServicer):
    """Disks are waited for in threads."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def Find(  # noqa: N802 - gRPC's name
        self, request: blob_pb2.FindRequest, context: _Context
    ) -> blob_pb2.FindResponse:
        """What is there."""
        if len(request.sha256) > DIGESTS_PER_FIND:
            raise _refusal(
                "sha256", len(request.sha256), f"{DIGESTS_PER_FIND} at most", "DIGEST_COUNT"
            )
        answer = blob_pb2.FindResponse()
        for sha256 in request.sha256:
            found = await asyncio.to_thread(self._blobs.find, sha256)
            answer.found.add(
                sha256=sha256, complete=found.complete, stored_bytes=found.stored_bytes
            )
        return answer

    async def Put(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[blob_pb2.PutRequest], context: _Context
    ) -> AsyncIterator[blob_pb2.PutResponse]:
        """Takes a blob in, from where it ended."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("payload") != "start":
            raise _refusal("PutRequest", "no start in the first", "start, then chunks", "GRAMMAR")
        start = first.start
        found = await asyncio.to_thread(self._blobs.find, start.sha256)
        if not found.complete:
            incoming = await asyncio.to_thread(self._blobs.receive, start.sha256, start.size_bytes)
            with closing(incoming):
                if incoming.stored_bytes < start.size_bytes:
                    yield blob_pb2.PutResponse(stored_bytes=incoming.stored_bytes)
                    await _gather(incoming, request_iterator)
                await asyncio.to_thread(incoming.finish)
        yield blob_pb2.PutResponse(stored_bytes=start.size_bytes, complete=True)

    async def Get(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[blob_pb2.GetRequest], context: _Context
    ) -> AsyncIterator[blob_pb2.GetResponse]:
        """Hands a blob out, from an offset on."""
        request = await anext(request_iterator, None)
        if request is None:
            raise _refusal("GetRequest", "none", "one", "GRAMMAR")
        size = (await asyncio.to_thread(self._blobs.find, request.sha256)).stored_bytes
        with closing(await asyncio.to_thread(self._blobs.open, request.sha256)) as file:
            if not 0 <= request.offset <= size:
                raise _refusal("offset", request.offset, f"0 to {size}", "OFFSET")
            await asyncio.to_thread(file.seek, request.offset)
            is_first = True
            while (chunk := await asyncio.to_thread(file.read, CHUNK_BYTES)) or is_first:
                yield blob_pb2.GetResponse(size_bytes=size, chunk=chunk)
                is_first = False


async def _gather(incoming: Incoming, requests: AsyncIterator[blob_pb2.PutRequest]) -> None:
    async for request in requests:
        if request.WhichOneof("payload") != "chunk":
            raise _refusal("PutRequest", "a second start", "chunks", "GRAMMAR")
        if len(request.chunk) > CHUNK_BYTES:
            raise _refusal("chunk", len(request.chunk), f"{CHUNK_BYTES} bytes", "CHUNK_SIZE")
        await asyncio.to_thread(incoming.add, request.chunk)


def _refusal(field: str, given: object, allowed: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {given} given, allowed is {allowed}",
        reason=reason,
        fields={"field": field, "given": str(given), "allowed": allowed},
    )
