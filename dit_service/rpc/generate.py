"""The DiT service on the wire: a request comes in, its events go out."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from dit_service import messages
from dit_service.rpc import describe, trace
from dit_service.rpc.adapters import Adapters
from dit_service.rpc.conditioning import Conditioner
from dit_service.rpc.conversions import Conversions
from dit_service.rpc.costs import Costs
from dit_service.rpc.request import Request
from dit_service.rpc.spec import Resolver
from dit_service.rpc.uploads import Uploads
from zimage_core.serving.admission import Admission, Limits
from zimage_core.serving.batches import answers_to
from zimage_core.serving.blobs import BlobServicer
from zimage_core.serving.worker import Worker
from zimage_core.settings import DitSettings
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc

_CONVERSIONS_AT_ONCE = 2  # one unpacks its file while the other has the device

T = TypeVar("T", bound=Message)
R = TypeVar("R")

_Context = grpc.aio.ServicerContext[Any, Any]


class DitServicer(dit_pb2_grpc.DitServiceServicer):
    """Takes requests in, has them conditioned, hands them to the worker, answers with events."""

    def __init__(
        self,
        worker: Worker,
        settings: DitSettings,
        conditioner: Conditioner,
        blobs: BlobServicer,
        adapters: Adapters,
    ) -> None:
        self._worker = worker
        self._blobs = blobs
        self._adapters = adapters
        self._settings = settings
        self._conditioner = conditioner
        self._admission = Admission(
            Limits(settings.max_queue_length, settings.max_queue_seconds, settings.max_queue_bytes)
        )
        self._costs = Costs()
        self._conversions = Conversions(worker, settings)

    async def Describe(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.DescribeRequest, context: _Context
    ) -> dit_pb2.DescribeResponse:
        """Answers while the model loads, with less."""
        return describe.response(self._worker, self._settings, self._conditioner)

    async def Generate(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[dit_pb2.GenerateRequest], context: _Context
    ) -> AsyncIterator[dit_pb2.GenerateResponse]:
        """From the spec to the last event; cancelling it ends the work at the next step."""
        uploads = Uploads(request_iterator, self._blobs)
        spec = await uploads.spec()
        model = self._worker.loaded(messages.Model)
        resolved = Resolver(model, self._settings).resolve(spec)
        request = Request(resolved, self._conditioner, self._adapters, model, self._costs)
        with self._admission.place() as place:
            await self._adapters.decide(resolved.spec.adapters)
            place.expect(request.cost, context.time_remaining())
            async with aclosing(request.answers(self._worker, place, uploads)) as answers:
                async for answer in answers:
                    yield answer
        await uploads.end()

    async def EncodeImages(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[dit_pb2.EncodeImagesRequest], context: _Context
    ) -> AsyncIterator[dit_pb2.EncodeImagesResponse]:
        """Latents for pictures, each for itself."""
        async for answer in self._each(request_iterator, self._conversions.encode):
            yield answer

    async def DecodeLatents(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[dit_pb2.DecodeLatentsRequest], context: _Context
    ) -> AsyncIterator[dit_pb2.DecodeLatentsResponse]:
        """Pictures for latents, each for itself."""
        async for answer in self._each(request_iterator, self._conversions.decode):
            yield answer

    async def AddAdapter(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.AddAdapterRequest, context: _Context
    ) -> dit_pb2.AddAdapterResponse:
        """Looks into the file before it gets the name."""
        shape = self._worker.loaded(messages.Model).shape
        return dit_pb2.AddAdapterResponse(adapter=await self._adapters.add(request, shape))

    async def GetAdapter(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.GetAdapterRequest, context: _Context
    ) -> dit_pb2.GetAdapterResponse:
        """What the file says, too."""
        shape = self._worker.loaded(messages.Model).shape
        return dit_pb2.GetAdapterResponse(adapter=await self._adapters.get(request.name, shape))

    async def ListAdapters(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.ListAdaptersRequest, context: _Context
    ) -> dit_pb2.ListAdaptersResponse:
        """Looks into no file."""
        return await self._adapters.list(request)

    async def RemoveAdapter(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.RemoveAdapterRequest, context: _Context
    ) -> dit_pb2.RemoveAdapterResponse:
        """The file stays for a while."""
        await self._adapters.remove(request.name)
        return dit_pb2.RemoveAdapterResponse()

    async def Trace(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.TraceRequest, context: _Context
    ) -> dit_pb2.TraceResponse:
        """What the worker remembers."""
        self._worker.loaded(messages.Model)
        asked = messages.Recall(trace.last_seconds(request))
        [recalled] = [event async for event in self._worker.call(asked)]
        assert isinstance(recalled, messages.Recalled)
        return await asyncio.to_thread(trace.response, recalled)

    async def _each(
        self, items: AsyncIterator[T], answer: Callable[[T], Coroutine[Any, Any, R]]
    ) -> AsyncIterator[R]:
        self._worker.loaded(messages.Model)

        @asynccontextmanager
        async def in_turn(item: T) -> AsyncIterator[R]:
            async with self._admission.turn(item.ByteSize()):
                yield await answer(item)

        async with aclosing(answers_to(items, in_turn, _CONVERSIONS_AT_ONCE)) as answers:
            async for one in answers:
                yield one
