"""What surrounds every call, over a real connection."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from zimage_core.serving import interceptors
from zimage_core.wire import status
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc

MORE_THAN_ANY_BUFFER = 200


class _Endless(dit_pb2_grpc.DitServiceServicer):
    def __init__(self) -> None:
        self.is_over = asyncio.Event()

    async def Generate(  # noqa: N802
        self, requests: Any, context: Any
    ) -> AsyncIterator[dit_pb2.GenerateResponse]:
        assert [request async for request in requests] == []
        chunk = dit_pb2.ArtifactChunk(data=bytes(1 << 20))
        try:
            for _ in range(MORE_THAN_ANY_BUFFER):
                yield dit_pb2.GenerateResponse(artifact_chunk=chunk)
        finally:
            self.is_over.set()


async def test_a_client_that_reads_no_more_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "_READER_SECONDS", 0.3)
    servicer = _Endless()
    server = grpc.aio.server(interceptors=[interceptors.Around()])
    dit_pb2_grpc.add_DitServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = dit_pb2_grpc.DitServiceStub(channel).Generate(iter(()))
            await asyncio.wait_for(servicer.is_over.wait(), 20)  # without reading a message
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                assert len([answer async for answer in call]) < MORE_THAN_ANY_BUFFER
        ended = refusal.value
        assert ended.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        error = status.from_status(ended.code(), ended.details(), ended.trailing_metadata())
        assert error.reason == "SLOW_READER"
    finally:
        await server.stop(None)
