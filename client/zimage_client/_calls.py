"""The calls themselves: messages out, messages or plain data back, errors always our own."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import grpc.aio

from zimage_client import _reading
from zimage_client._channel import Metadata
from zimage_client._conditioning import prompt_message
from zimage_client._description import DitDescription, EncoderDescription
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import Cancelled, ZImageError
from zimage_core.wire import status
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc

ENCODE_SECONDS = 30.0
DESCRIBE_SECONDS = 10.0
"""How long calls may take unless their caller says otherwise."""


async def encode(
    channel: grpc.aio.Channel,
    prompts: Sequence[Prompt],
    timeout: float | None,
    metadata: Metadata,
) -> list[Embedding]:
    """The embeddings of some prompts, in order."""
    request = encoder_pb2.EncodeRequest(prompts=[prompt_message(p) for p in prompts])
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    with _typed_errors():
        response = await stub.Encode(request, timeout=timeout, metadata=metadata)
    if len(response.embeddings) != len(prompts):
        raise _reading.malformed(f"{len(response.embeddings)} embeddings of {len(prompts)} prompts")
    return [_reading.embedding(message) for message in response.embeddings]


async def encode_stream(
    channel: grpc.aio.Channel,
    items: AsyncIterator[encoder_pb2.EncodeStreamRequest],
    timeout: float | None,
    metadata: Metadata,
) -> AsyncGenerator[tuple[int, Embedding | ZImageError], None]:
    """What came of each item, by its number, as it is done."""
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    call = stub.EncodeStream(items, timeout=timeout, metadata=metadata)
    try:
        with _typed_errors():
            async for answer in call:
                match answer.WhichOneof("result"):
                    case "embedding":
                        yield answer.item_id, _reading.embedding(answer.embedding)
                    case "failure":
                        yield answer.item_id, status.from_failure(answer.failure)
                    case _:
                        raise _reading.malformed(f"item {answer.item_id} has no result")
    finally:
        call.cancel()  # without effect on a call that has ended


async def describe_dit(
    channel: grpc.aio.Channel, timeout: float | None, metadata: Metadata
) -> DitDescription:
    """What the DiT service says of itself."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    with _typed_errors():
        response = await stub.Describe(
            dit_pb2.DescribeRequest(), timeout=timeout, metadata=metadata
        )
    return _reading.dit_description(response)


async def describe_encoder(
    channel: grpc.aio.Channel, timeout: float | None, metadata: Metadata
) -> EncoderDescription:
    """What the encoder service says of itself."""
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    with _typed_errors():
        response = await stub.Describe(
            encoder_pb2.DescribeRequest(), timeout=timeout, metadata=metadata
        )
    return _reading.encoder_description(response)


async def generate(
    channel: grpc.aio.Channel,
    spec: dit_pb2.GenerateSpec,
    timeout: float | None,
    metadata: Metadata,
) -> AsyncGenerator[dit_pb2.GenerateResponse, None]:
    """One try of a request; leaving it early cancels it on the server."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    request = dit_pb2.GenerateRequest(spec=spec)
    call = stub.Generate(iter([request]), timeout=timeout, metadata=metadata)
    try:
        with _typed_errors():
            async for response in call:
                yield response
    finally:
        call.cancel()  # without effect on a call that has ended


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        trailers = error.trailing_metadata() or ()
        raise status.from_status(error.code(), error.details() or "", trailers) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Cancelled("the client was closed with this call in flight") from None
