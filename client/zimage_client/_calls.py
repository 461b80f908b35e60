"""The calls themselves: messages out, messages or plain data back, errors always our own."""

import asyncio
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import grpc.aio

from zimage_client import _reading
from zimage_client._channel import Metadata
from zimage_client._conditioning import prompt_message
from zimage_client._description import (
    Adapter,
    DitDescription,
    EncoderDescription,
    TokenCount,
    Trace,
)
from zimage_client._events import DecodedImage
from zimage_client._items import Answers
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import Cancelled
from zimage_core.files import chunks as file_chunks
from zimage_core.tensors import TensorData
from zimage_core.wire import status
from zimage_core.wire.limits import CHUNK_BYTES
from zimage_rpc.blob.v1 import blob_pb2, blob_pb2_grpc
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc, training_pb2, training_pb2_grpc
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc

T = TypeVar("T")

_PUT_BYTES = 1 << 18
"""Services wait a minute for the next piece, which a slow line must get through by then."""

ENCODE_SECONDS = 30.0
DESCRIBE_SECONDS = 10.0
TRACE_SECONDS = 60.0
ADAPTER_SECONDS = 60.0
"""How long calls may take unless their caller says otherwise."""


async def encode(
    channel: grpc.aio.Channel,
    prompts: Sequence[Prompt],
    packing: int,
    timeout: float | None,
    metadata: Metadata,
) -> list[Embedding]:
    """The embeddings of some prompts, in order."""
    messages = [prompt_message(prompt) for prompt in prompts]
    request = encoder_pb2.EncodeRequest(prompts=messages, packing=cast("Any", packing))
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    with TypedErrors():
        response = await stub.Encode(request, timeout=timeout, metadata=metadata)
    if len(response.embeddings) != len(prompts):
        raise _reading.malformed(f"{len(response.embeddings)} embeddings of {len(prompts)} prompts")
    return [_reading.embedding(message) for message in response.embeddings]


def encode_session(
    channel: grpc.aio.Channel,
    items: AsyncIterator[encoder_pb2.EncodeSessionRequest],
    timeout: float | None,
    metadata: Metadata,
) -> Answers[Embedding | TokenCount]:
    """What comes of a prompt while it is typed."""
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    call = stub.EncodeSession(items, timeout=timeout, metadata=metadata)
    return _results(call, _reading.edited)


async def count_tokens(
    channel: grpc.aio.Channel,
    prompts: Sequence[Prompt],
    timeout: float | None,
    metadata: Metadata,
) -> list[TokenCount]:
    """How long some prompts are, in order."""
    request = encoder_pb2.CountTokensRequest(prompts=map(prompt_message, prompts))
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    with TypedErrors():
        response = await stub.CountTokens(request, timeout=timeout, metadata=metadata)
    return [_reading.token_count(count) for count in response.counts]


def encode_stream(
    channel: grpc.aio.Channel,
    items: AsyncIterator[encoder_pb2.EncodeStreamRequest],
    timeout: float | None,
    metadata: Metadata,
) -> Answers[Embedding]:
    """The embeddings of prompts, each for itself."""
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    return _results(
        stub.EncodeStream(items, timeout=timeout, metadata=metadata), _reading.embedding
    )


def encode_images(
    channel: grpc.aio.Channel,
    items: AsyncIterator[dit_pb2.EncodeImagesRequest],
    timeout: float | None,
    metadata: Metadata,
) -> Answers[TensorData]:
    """The latents of pictures, each for itself."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    return _results(stub.EncodeImages(items, timeout=timeout, metadata=metadata), _reading.latents)


def decode_latents(
    channel: grpc.aio.Channel,
    items: AsyncIterator[dit_pb2.DecodeLatentsRequest],
    timeout: float | None,
    metadata: Metadata,
) -> Answers[DecodedImage]:
    """The pictures of latents, each for itself."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    return _results(
        stub.DecodeLatents(items, timeout=timeout, metadata=metadata), _reading.decoded_image
    )


async def _results(call: Any, read: Callable[[Any], T]) -> Answers[T]:
    """What came of each item of a stream, by its number, as it is done."""
    try:
        with TypedErrors(call):
            async for answer in call:
                match answer.WhichOneof("result"):
                    case None:
                        raise _reading.malformed(f"item {answer.item_id} has no result")
                    case "failure":
                        yield answer.item_id, status.from_failure(answer.failure)
                    case name:
                        yield answer.item_id, read(getattr(answer, name))
    finally:
        call.cancel()  # without effect on a call that has ended
        del call


async def describe_dit(
    channel: grpc.aio.Channel, timeout: float | None, metadata: Metadata
) -> DitDescription:
    """What the DiT service says of itself."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    with TypedErrors():
        response = await stub.Describe(
            dit_pb2.DescribeRequest(), timeout=timeout, metadata=metadata
        )
    return _reading.dit_description(response)


async def describe_encoder(
    channel: grpc.aio.Channel, timeout: float | None, metadata: Metadata
) -> EncoderDescription:
    """What the encoder service says of itself."""
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    with TypedErrors():
        response = await stub.Describe(
            encoder_pb2.DescribeRequest(), timeout=timeout, metadata=metadata
        )
    return _reading.encoder_description(response)


async def add_adapter(
    channel: grpc.aio.Channel,
    request: dit_pb2.AddAdapterRequest,
    timeout: float | None,
    metadata: Metadata,
) -> Adapter:
    """Gives a file a name."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    with TypedErrors():
        response = await stub.AddAdapter(request, timeout=timeout, metadata=metadata)
    return _reading.adapter(response.adapter)


async def get_adapter(
    channel: grpc.aio.Channel, name: str, timeout: float | None, metadata: Metadata
) -> Adapter:
    """What is known of one."""
    request = dit_pb2.GetAdapterRequest(name=name)
    stub = dit_pb2_grpc.DitServiceStub(channel)
    with TypedErrors():
        response = await stub.GetAdapter(request, timeout=timeout, metadata=metadata)
    return _reading.adapter(response.adapter)


async def plan_training(
    channel: grpc.aio.Channel,
    request: training_pb2.PlanTrainingRequest,
    timeout: float | None,
    metadata: Metadata,
) -> training_pb2.TrainingForecast:
    """What would become of a training."""
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    with TypedErrors():
        response = await stub.PlanTraining(request, timeout=timeout, metadata=metadata)
    return response.forecast


async def list_adapters(
    channel: grpc.aio.Channel, timeout: float | None, metadata: Metadata
) -> list[Adapter]:
    """All, page by page."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    found: list[Adapter] = []
    request = dit_pb2.ListAdaptersRequest()
    while True:
        with TypedErrors():
            page = await stub.ListAdapters(request, timeout=timeout, metadata=metadata)
        found += [_reading.adapter(one) for one in page.adapters]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def remove_adapter(
    channel: grpc.aio.Channel, name: str, timeout: float | None, metadata: Metadata
) -> None:
    """Takes a name away."""
    request = dit_pb2.RemoveAdapterRequest(name=name)
    stub = dit_pb2_grpc.DitServiceStub(channel)
    with TypedErrors():
        await stub.RemoveAdapter(request, timeout=timeout, metadata=metadata)


async def trace(
    channel: grpc.aio.Channel,
    last_seconds: float | None,
    timeout: float | None,
    metadata: Metadata,
) -> Trace:
    """What the DiT service's device did of late."""
    request = dit_pb2.TraceRequest()
    if last_seconds is not None:
        request.last.FromNanoseconds(round(last_seconds * 1e9))
    stub = dit_pb2_grpc.DitServiceStub(channel)
    with TypedErrors():
        response = await stub.Trace(request, timeout=timeout, metadata=metadata)
    return _reading.trace(response)


async def generate(
    channel: grpc.aio.Channel,
    spec: dit_pb2.GenerateSpec,
    named: Mapping[str, bytes],
    timeout: float | None,
    metadata: Metadata,
) -> AsyncGenerator[dit_pb2.GenerateResponse, None]:
    """One try of a request; leaving it early cancels it on the server. What the spec only names is
    sent if the service needs it."""
    stub = dit_pb2_grpc.DitServiceStub(channel)
    needed: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    if not named:
        needed.set_result([])

    async def messages() -> AsyncIterator[dit_pb2.GenerateRequest]:
        yield dit_pb2.GenerateRequest(spec=spec)
        for sha256 in await needed:
            data = named[sha256]
            for at in range(0, len(data), CHUNK_BYTES):
                chunk = dit_pb2.BlobChunk(sha256=sha256, data=data[at : at + CHUNK_BYTES])
                yield dit_pb2.GenerateRequest(chunk=chunk)

    call = stub.Generate(messages(), timeout=timeout, metadata=metadata)
    try:
        with TypedErrors(call):
            held = []
            async for response in call:
                held.append(response)
                if not needed.done():
                    if response.WhichOneof("event") == "accepted":
                        continue  # whoever reads it may take a while, and the service waits for us
                    needed.set_result(_needed(response, named))
                while held:
                    yield held.pop(0)
    finally:
        needed.cancel()
        call.cancel()  # without effect on a call that has ended
        del call


def _needed(response: dit_pb2.GenerateResponse, named: Mapping[str, bytes]) -> list[str]:
    digests = [digest.sha256 for digest in response.need.digests]
    if strange := set(digests) - named.keys():
        raise _reading.malformed(f"it asks for {', '.join(strange)}, which was not named")
    return digests


async def find_blobs(
    channel: grpc.aio.Channel, digests: Sequence[str], timeout: float | None, metadata: Metadata
) -> set[str]:
    """Those that are there, whole."""
    stub = blob_pb2_grpc.BlobServiceStub(channel)
    request = blob_pb2.FindRequest(sha256=digests)
    with TypedErrors():
        response = await stub.Find(request, timeout=timeout, metadata=metadata)
    return {found.sha256 for found in response.found if found.complete}


async def put_blob(
    channel: grpc.aio.Channel,
    start: blob_pb2.PutStart,
    file: Path,
    timeout: float | None,
    metadata: Metadata,
) -> AsyncGenerator[blob_pb2.PutResponse, None]:
    """One try: what the service has by now, first and last."""
    stub = blob_pb2_grpc.BlobServiceStub(channel)
    begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    faults: list[OSError] = []

    async def messages() -> AsyncIterator[blob_pb2.PutRequest]:
        yield blob_pb2.PutRequest(start=start)
        try:
            pieces = iter(file_chunks(file, await begun, _PUT_BYTES))
            while chunk := await asyncio.to_thread(next, pieces, b""):
                yield blob_pb2.PutRequest(chunk=chunk)
        except OSError as fault:  # gRPC would only say that the call was cancelled
            faults.append(fault)
            raise

    call = stub.Put(messages(), timeout=timeout, metadata=metadata)
    try:
        with TypedErrors(call):
            async for response in call:
                if not begun.done():
                    begun.set_result(response.stored_bytes)
                yield response
    except Cancelled:
        if faults:
            raise faults[0] from None
        raise
    finally:
        begun.cancel()
        call.cancel()  # without effect on a call that has ended
        del call


async def get_blob(
    channel: grpc.aio.Channel,
    sha256: str,
    offset: int,
    timeout: float | None,
    metadata: Metadata,
) -> AsyncGenerator[blob_pb2.GetResponse, None]:
    """One try: the pieces from an offset on."""
    stub = blob_pb2_grpc.BlobServiceStub(channel)
    request = blob_pb2.GetRequest(sha256=sha256, offset=offset)
    call = stub.Get(iter([request]), timeout=timeout, metadata=metadata)
    try:
        with TypedErrors(call):
            async for response in call:
                yield response
    finally:
        call.cancel()  # without effect on a call that has ended
        del call


class TypedErrors:
    """Raises errors of ours instead of gRPC's, and lets go of gRPC's frames: as long as anything
    refers to a call, its connection is kept up, also when its channel is closed.

    A stream that the server ended while a message was on its way would tell of that message alone:
    gRPC puts the failure to send in the place of the server's status (grpc/grpc#36066). So the
    status is read as it comes.
    """

    def __init__(self, stream: Any = None) -> None:
        self._status: _Status | None = None
        if stream is not None:
            # Its own add_done_callback would make it refer to itself, and stay.
            stream._cython_call.add_done_callback(partial(self._hear, weakref.ref(stream)))

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del trace
        if isinstance(error, grpc.aio.AioRpcError):
            error.__traceback__ = None
            said = error.code(), error.details() or "", error.trailing_metadata() or ()
            raise status.from_status(*(self._status or said)) from None
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise Cancelled("the client was closed with this call in flight") from None

    def _hear(self, to_stream: Callable[[], Any]) -> None:
        stream = to_stream()
        if stream is None or self._status is not None:
            return
        code, details, trailers = map(
            _at_once, (stream.code(), stream.details(), stream.trailing_metadata())
        )
        if code is not grpc.StatusCode.OK:
            self._status = code, details or "", trailers or ()


_Status = tuple[grpc.StatusCode, str, Iterable[tuple[str, str | bytes]]]


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of one that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")
