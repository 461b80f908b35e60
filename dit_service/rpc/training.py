"""Training on the wire: which session a call goes on with, and how long one is kept whose call
broke off."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import grpc.aio

from dit_service import messages
from dit_service.rpc.training_session import (
    Request,
    Response,
    TrainingSession,
    refusal,
    stopping,
)
from zimage_core.errors import InvalidRequest, NotReady
from zimage_core.planning.shares import BACKGROUND, Share
from zimage_core.serving import access
from zimage_core.serving.worker import Worker
from zimage_core.store.blobs import Blobs, check_name
from zimage_core.wire import training as plans
from zimage_rpc.dit.v1 import training_pb2, training_pb2_grpc

_log = logging.getLogger(__name__)

_SILENT_SECONDS = 30.0
_KEPT_SECONDS = 600.0
"""A session whose client is gone."""
_RECONNECTING_SECONDS = 60.0
"""What a client that comes back takes for it at most: so long nobody else gets its room."""
_DOUBT_SECONDS = 0.2
_REMEMBERED_JOBS = 1000

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(eq=False)
class _Stretch:
    """A call's part of a session."""

    session: TrainingSession
    told: asyncio.Queue[Response | None]
    task: asyncio.Task[None]
    is_over: bool = False
    """Whether a later one of its job has begun, or is about to."""
    forgetting: asyncio.Task[None] | None = None
    """Where its client is gone."""
    gone_since: float = math.inf


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Hands trainings to the worker."""

    def __init__(self, worker: Worker, blobs: Blobs, weight: float) -> None:
        """The weight is that of each project's trainings, next to pictures."""
        self._worker = worker
        self._blobs = blobs
        self._weight = weight
        self._epochs: OrderedDict[str, int] = OrderedDict()
        """The latest stretches of jobs of late."""
        self._stretches: dict[str, _Stretch] = {}
        """By their jobs, also those whose clients are gone."""
        self._is_leaving = False

    async def leave(self) -> None:
        """Lets every training take a checkpoint, to go on elsewhere."""
        self._is_leaving = True
        heard = [one for one in self._stretches.values() if one.forgetting is None]
        for stretch in heard:
            stretch.session.shall_leave.set()
        if heard:
            await asyncio.wait([stretch.task for stretch in heard])

    async def TrainSession(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[Request], context: _Context
    ) -> AsyncIterator[Response]:
        """From the opening to the last checkpoint. When its connection breaks, the session waits a
        while for another call."""
        opening = await _opening(request_iterator)
        if self._is_leaving:
            raise stopping()
        job = f"{access.project()}/{check_name(opening.job, 'open.job')}"
        self._enter_epoch(job, opening)
        stretch = await self._begin(job, opening, request_iterator)
        is_answered = False
        try:
            for sequence in count(1):
                answer = await stretch.told.get()
                if answer is None:
                    break
                answer.sequence = sequence
                answer.event_time.GetCurrentTime()
                yield answer
            if stretch.is_over:
                raise _replaced(opening)
            stretch.task.result()  # raises what ended it
            await asyncio.sleep(_DOUBT_SECONDS)  # a broken connection looks like an end
            is_answered = True
        finally:
            if not stretch.is_over:
                is_answered |= stretch.session.is_ended
                is_answered |= stretch.task.done() and _failure(stretch.task) is not None
                await asyncio.shield(self._part_with(job, stretch, is_answered))

    async def PlanTraining(  # noqa: N802 - gRPC's name
        self, request: training_pb2.PlanTrainingRequest, context: _Context
    ) -> training_pb2.PlanTrainingResponse:
        """What the worker says."""
        model = self._worker.loaded(messages.Model)
        asked = messages.PlanTraining(
            plans.plan(request.plan, model.shape, "plan"),
            plans.sizes(request.largest_batch, "largest_batch"),
            request.batch_is_open,
        )
        count = len(asked.largest)
        if not count or (asked.batch_is_open and count > 1):
            allowed = "one where batch_is_open, otherwise 1 to 256"
            raise InvalidRequest.given(
                "largest_batch", f"{count} samples", allowed, "TRAINING_PLAN"
            )
        [forecast] = [event async for event in self._worker.call(asked)]
        assert isinstance(forecast, messages.TrainingForecast)
        return training_pb2.PlanTrainingResponse(forecast=_forecast(forecast))

    def _enter_epoch(self, job: str, opening: training_pb2.OpenTraining) -> None:
        """Earlier stretches of the job are over. Raises NotReady for one that is over itself,
        whoever comes back with it."""
        epoch = opening.session_epoch
        if epoch <= self._epochs.get(job, 0):
            raise _replaced(opening)
        self._epochs[job] = epoch
        self._epochs.move_to_end(job)
        while len(self._epochs) > _REMEMBERED_JOBS:
            self._epochs.popitem(last=False)

    async def _begin(
        self, job: str, opening: training_pb2.OpenTraining, requests: AsyncIterator[Request]
    ) -> _Stretch:
        """Goes on with the session that there is, where that is asked for, or begins one."""
        session = await self._taken_up(job, opening)
        if session is None:
            name = f"{job}/{opening.session_epoch}"
            share = Share(access.project(), BACKGROUND, self._weight)
            session = TrainingSession(name, share, self._worker, self._blobs, self._make_room)
        if self._is_leaving:
            session.shall_leave.set()
        told = session.told
        task = asyncio.create_task(session.run(opening, requests))
        task.add_done_callback(lambda _done: told.put_nowait(None))
        self._stretches[job] = _Stretch(session, told, task)
        return self._stretches[job]

    async def _taken_up(
        self, job: str, opening: training_pb2.OpenTraining
    ) -> TrainingSession | None:
        """What is left of the stretch before, once all that was sent is learnt. It is there for
        others until then: this call may break off, too."""
        before = self._stretches.get(job)
        if before is None:
            return None
        before.is_over = True
        self._park(job, before)
        await asyncio.wait([before.task])
        self._refuse_replaced(job, opening)
        if self._stretches.get(job) is not before:
            return None  # it failed, and is forgotten
        if _failure(before.task) is None and before.session.can_go_on(opening):
            self._unlist(job, before)
            before.session.take_up(opening)
            return before.session
        await asyncio.shield(self._forget(job, before))
        self._refuse_replaced(job, opening)
        return None

    def _refuse_replaced(self, job: str, opening: training_pb2.OpenTraining) -> None:
        if self._epochs.get(job) != opening.session_epoch:
            raise _replaced(opening)

    async def _part_with(self, job: str, stretch: _Stretch, is_answered: bool) -> None:
        """Its call is over: there is nothing more to say, or nobody to say it to."""
        if is_answered or self._is_leaving:
            await self._forget(job, stretch)
        else:
            self._park(job, stretch)

    def _park(self, job: str, stretch: _Stretch) -> None:
        stretch.session.client_is_gone.set()
        if stretch.forgetting is None:
            stretch.gone_since = time.monotonic()
            stretch.forgetting = asyncio.create_task(self._forget_later(job, stretch))

    async def _forget_later(self, job: str, stretch: _Stretch) -> None:
        await asyncio.wait([stretch.task])
        if _failure(stretch.task) is None:
            _log.info("the client of training %s is gone; it is kept for a while", job)
            await asyncio.sleep(_KEPT_SECONDS)
        stretch.forgetting = None  # or it would end itself
        await self._forget(job, stretch)

    def _unlist(self, job: str, stretch: _Stretch) -> None:
        del self._stretches[job]
        if stretch.forgetting:
            stretch.forgetting.cancel()

    async def _forget(self, job: str, stretch: _Stretch) -> None:
        if self._stretches.get(job) is not stretch:
            return  # somebody else has
        self._unlist(job, stretch)
        stretch.task.cancel()
        await asyncio.wait([stretch.task])
        await stretch.session.close()

    async def _make_room(self) -> bool:
        """Forgets all whose clients do not seem to come back; whether there were any."""
        since = time.monotonic() - _RECONNECTING_SECONDS
        gone = [(job, one) for job, one in self._stretches.items() if one.gone_since < since]
        for job, stretch in gone:
            await self._forget(job, stretch)
        return bool(gone)


def _forecast(forecast: messages.TrainingForecast) -> training_pb2.TrainingForecast:
    message = training_pb2.TrainingForecast(
        plan=plans.message(forecast.plan),
        batch_size=forecast.batch_size,
        parameter_count=forecast.parameter_count,
        weights_bytes=round(forecast.taken.weights),
        learnt_bytes=round(forecast.taken.learnt),
        step_bytes=round(forecast.taken.step),
    )
    if math.isfinite(forecast.room_bytes):
        message.room_bytes = round(forecast.room_bytes)
    if forecast.step_seconds is not None:
        message.step_duration.FromNanoseconds(round(forecast.step_seconds * 1e9))
    return message


async def _opening(requests: AsyncIterator[Request]) -> training_pb2.OpenTraining:
    try:
        async with asyncio.timeout(_SILENT_SECONDS):
            first = await anext(requests, None)
    except TimeoutError:
        raise refusal(f"nothing within {_SILENT_SECONDS:g} s") from None
    if first is None or first.WhichOneof("payload") != "open":
        raise refusal("no open in the first")
    return first.open


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _replaced(opening: training_pb2.OpenTraining) -> NotReady:
    return NotReady(
        f"stretch {opening.session_epoch} of {opening.job} is over: a later one was opened",
        reason="SESSION_REPLACED",
        fields={"field": "open.session_epoch", "given": str(opening.session_epoch)},
    )
