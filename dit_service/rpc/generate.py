"""The DiT service on the wire: a request comes in, its events go out."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from dit_service import messages
from dit_service.rpc import describe
from dit_service.rpc.conditioning import Conditioner
from dit_service.rpc.request import Request
from dit_service.rpc.spec import Resolver
from zimage_core.errors import InvalidRequest
from zimage_core.serving.admission import Admission
from zimage_core.serving.worker import Worker
from zimage_core.settings import DitSettings
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc

_FIRST_MESSAGE_SECONDS = 30.0  # a silent caller would hold up a drain

_Context = grpc.aio.ServicerContext[Any, Any]


class DitServicer(dit_pb2_grpc.DitServiceServicer):
    """Takes requests in, has them conditioned, hands them to the worker, answers with events."""

    def __init__(self, worker: Worker, settings: DitSettings, conditioner: Conditioner) -> None:
        self._worker = worker
        self._settings = settings
        self._conditioner = conditioner
        self._admission = Admission(settings.max_queue_length)

    async def Describe(  # noqa: N802 - gRPC's name
        self, request: dit_pb2.DescribeRequest, context: _Context
    ) -> dit_pb2.DescribeResponse:
        """Answers while the model loads, with less."""
        model = self._worker.description
        assert model is None or isinstance(model, messages.Model)
        return describe.response(model, self._settings, self._conditioner)

    async def Generate(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[dit_pb2.GenerateRequest], context: _Context
    ) -> AsyncIterator[dit_pb2.GenerateResponse]:
        """From the spec to the last event; cancelling it ends the work at the next step."""
        spec = await _only_spec(request_iterator)
        model = self._worker.loaded(messages.Model)
        resolved = Resolver(model, self._settings).resolve(spec)
        request = Request(resolved, self._conditioner, model)
        with self._admission.place() as requests_before:
            numbers = itertools.count(1)
            async with aclosing(request.events(self._worker, requests_before)) as events:
                async for event in events:
                    event.sequence = next(numbers)
                    event.event_time.GetCurrentTime()
                    yield event


async def _only_spec(requests: AsyncIterator[dit_pb2.GenerateRequest]) -> dit_pb2.GenerateSpec:
    """The spec in the first message; what comes after it is not read."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FIRST_MESSAGE_SECONDS):
            async for request in requests:
                if request.WhichOneof("payload") == "spec":
                    return request.spec
                break
    raise InvalidRequest(
        "GenerateRequest.payload: the first message must hold the spec",
        reason="NO_SPEC",
        fields={"field": "GenerateRequest.payload", "allowed": "spec"},
    )
