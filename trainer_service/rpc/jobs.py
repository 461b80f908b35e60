"""Jobs on the wire."""

import asyncio
import math
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any

import grpc.aio

from trainer_service import keeping
from trainer_service.desk import Desk, is_passing, suited
from trainer_service.foreseeing import forecast
from trainer_service.jobs.jobs import (
    CHECKPOINT,
    DRAWN,
    ENDED,
    WAITING,
    Happened,
    Job,
    Kept,
    Sampled,
)
from trainer_service.preparing import Caching
from trainer_service.rpc.spec import decided, warnings
from trainer_service.running import Runner
from zimage_client import TrainStep, training
from zimage_core.errors import InvalidRequest, Unavailable, ZImageError
from zimage_core.serving import access
from zimage_core.store.blobs import check_name
from zimage_core.wire import features, names
from zimage_rpc.trainer.v1 import trainer_pb2, trainer_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

VERSION = metadata.version("zimage-grpc")

_USUAL_PAGE, _LARGEST_PAGE = 100, 1000
_STEPS_AT_ONCE = 1000
_SILENT_SECONDS = 30.0
_USUAL_UNUSED_SECONDS = 30 * 86_400.0

_Context = grpc.aio.ServicerContext[Any, Any]


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """What people ask of jobs."""

    def __init__(self, desk: Desk, runner: Runner) -> None:
        self._desk = desk
        self._runner = runner

    async def Describe(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.DescribeRequest, context: _Context
    ) -> trainer_pb2.DescribeResponse:
        """What this service is."""
        return trainer_pb2.DescribeResponse(version=VERSION, features=features.TRAINER)

    async def PlanTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.PlanTrainJobRequest, context: _Context
    ) -> trainer_pb2.PlanTrainJobResponse:
        """Looks at everything but the pictures."""
        self._runner.refuse_standing_by()
        client, dit = await suited(self._desk, request.spec)
        spec = await decided(self._desk, dit, request.spec, are_pictures_here=False)
        answer = trainer_pb2.PlanTrainJobResponse(warnings=warnings(dit, spec))
        try:
            answer.forecast.CopyFrom(await forecast(self._desk, client, dit, spec))
        except ZImageError as error:
            if not is_passing(error):
                raise
            answer.waits_for = error.message
        answer.spec.CopyFrom(spec)
        return answer

    async def CreateTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.CreateTrainJobRequest, context: _Context
    ) -> trainer_pb2.CreateTrainJobResponse:
        """Looks at everything before it says yes."""
        check_name(request.request_id, "request_id")
        self._runner.refuse_standing_by()
        project, jobs = access.project(), self._desk.jobs
        asked = request.spec.SerializeToString(deterministic=True)
        made = await self._desk.aside(lambda: jobs.made_of(project, request.request_id, asked))
        if made is not None:
            if made.state == WAITING:  # the answer to the first request may have been lost half way
                await self._runner.begin(made.id)
            return trainer_pb2.CreateTrainJobResponse(job=_message(made))
        _, dit = await suited(self._desk, request.spec)
        decision = await decided(self._desk, dit, request.spec)
        spec = decision.SerializeToString(deterministic=True)
        job = await self._desk.aside(lambda: jobs.create(project, request.request_id, asked, spec))
        try:
            await asyncio.shield(self._runner.begin(job.id))
        except ZImageError:  # what it needs went meanwhile
            await self._desk.aside(lambda: jobs.delete(job.id))
            raise
        return trainer_pb2.CreateTrainJobResponse(
            job=_message(job), warnings=warnings(dit, decision)
        )

    async def GetTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.GetTrainJobRequest, context: _Context
    ) -> trainer_pb2.GetTrainJobResponse:
        """How it is."""
        return trainer_pb2.GetTrainJobResponse(job=_message(await self._get(request.id)))

    async def ListTrainJobs(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.ListTrainJobsRequest, context: _Context
    ) -> trainer_pb2.ListTrainJobsResponse:
        """A page."""
        count = request.page_size or _USUAL_PAGE
        if not 1 <= count <= _LARGEST_PAGE:
            allowed = f"1 to {_LARGEST_PAGE}"
            raise InvalidRequest.given("page_size", count, allowed, "PAGE_SIZE")
        self._runner.refuse_standing_by()
        try:
            before = float(request.page_token or "inf")
        except ValueError:
            raise InvalidRequest.given(
                "page_token", request.page_token[:100], "that of the page before", "PAGE_TOKEN"
            ) from None
        project = access.project()
        jobs = await self._desk.aside(lambda: self._desk.jobs.page(project, before, count))
        answer = trainer_pb2.ListTrainJobsResponse(jobs=map(_message, jobs))
        if len(jobs) == count:
            answer.next_page_token = repr(jobs[-1].created)
        return answer

    async def WatchTrainJob(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[trainer_pb2.WatchTrainJobRequest],
        context: _Context,
    ) -> AsyncIterator[trainer_pb2.WatchTrainJobResponse]:
        """All that the caller does not know, then what comes."""
        first = await _only(request_iterator)
        after = first.after_sequence
        after_step = first.after_step if first.HasField("after_step") else -1
        await self._get(first.id)
        caching = None
        while True:
            bell = self._runner.bell(first.id)
            before = await self._get(first.id)
            if (now := self._runner.caching(first.id)) and now != caching:
                caching = now
                yield _caching(now)
            while steps := await self._steps(before.id, after_step):
                for learnt in steps:
                    yield _step(learnt)
                after_step = steps[-1].step
            happened = await self._happened(before.id, after)
            job = await self._get(first.id)  # later than what happened: it knows of it
            for one in happened:
                after = one.sequence
                if one.kind == DRAWN:
                    yield _samples(one, await self._samples(job.id, one.step))
                elif event := _event(one, job):
                    yield event
            if before.state in ENDED or first.only_past:
                return
            if self._runner.is_leaving:
                raise Unavailable("the trainer is being stopped", reason="STOPPING")
            await bell.wait()

    async def PauseTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.PauseTrainJobRequest, context: _Context
    ) -> trainer_pb2.PauseTrainJobResponse:
        """Soon."""
        job = await self._runner.pause(await self._get(request.id))
        return trainer_pb2.PauseTrainJobResponse(job=_message(job))

    async def ResumeTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.ResumeTrainJobRequest, context: _Context
    ) -> trainer_pb2.ResumeTrainJobResponse:
        """When its turn comes."""
        job = await self._runner.resume(await self._get(request.id))
        return trainer_pb2.ResumeTrainJobResponse(job=_message(job))

    async def CancelTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.CancelTrainJobRequest, context: _Context
    ) -> trainer_pb2.CancelTrainJobResponse:
        """At once."""
        job = await self._runner.cancel(await self._get(request.id))
        return trainer_pb2.CancelTrainJobResponse(job=_message(job))

    async def DeleteTrainJob(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.DeleteTrainJobRequest, context: _Context
    ) -> trainer_pb2.DeleteTrainJobResponse:
        """Once it has ended."""
        await self._runner.delete(await self._get(request.id))
        return trainer_pb2.DeleteTrainJobResponse()

    async def DescribeCache(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.DescribeCacheRequest, context: _Context
    ) -> trainer_pb2.DescribeCacheResponse:
        """How much there is."""
        heaps = await self._desk.aside(lambda: keeping.heaps(self._desk.blobs))
        return trainer_pb2.DescribeCacheResponse(kinds=map(_kind, heaps))

    async def VerifyCache(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.VerifyCacheRequest, context: _Context
    ) -> trainer_pb2.VerifyCacheResponse:
        """A page."""
        behind = request.page_token
        page = await self._desk.aside(lambda: keeping.verify(self._desk.blobs, behind))
        return trainer_pb2.VerifyCacheResponse(
            count=page.count, torn=page.torn, next_page_token=page.last
        )

    async def PruneCache(  # noqa: N802 - gRPC's name
        self, request: trainer_pb2.PruneCacheRequest, context: _Context
    ) -> trainer_pb2.PruneCacheResponse:
        """What is old."""
        most_bytes = request.most_bytes if request.HasField("most_bytes") else None
        usual = _USUAL_UNUSED_SECONDS if most_bytes is None else math.inf
        is_given = request.HasField("unused_for")
        seconds = request.unused_for.ToNanoseconds() / 1e9 if is_given else usual
        if seconds < 0:
            raise InvalidRequest.given("unused_for", f"{seconds:g} s", "0 s or more", "DURATION")
        if most_bytes is not None and most_bytes < 0:
            raise InvalidRequest.given("most_bytes", most_bytes, "0 or more", "SIZE")
        gone = await self._desk.aside(lambda: self._runner.prune(seconds, most_bytes))
        return trainer_pb2.PruneCacheResponse(kinds=map(_kind, gone))

    async def _get(self, job: str) -> Job:
        self._runner.refuse_standing_by()
        project = access.project()
        return await self._desk.aside(lambda: self._desk.jobs.get(project, job))

    async def _happened(self, job: str, after: int) -> list[Happened]:
        return await self._desk.aside(lambda: self._desk.jobs.happened(job, after))

    async def _samples(self, job: str, step: int) -> list[Sampled]:
        return await self._desk.aside(lambda: self._desk.jobs.samples(job, step))

    async def _steps(self, job: str, after: int) -> list[TrainStep]:
        return await self._desk.aside(lambda: self._desk.jobs.steps(job, after, _STEPS_AT_ONCE))


async def _only(
    requests: AsyncIterator[trainer_pb2.WatchTrainJobRequest],
) -> trainer_pb2.WatchTrainJobRequest:
    """The one message of a call."""
    try:
        async with asyncio.timeout(_SILENT_SECONDS):
            first, second = await anext(requests, None), await anext(requests, None)
        given = "more than one" if first else "none"
    except TimeoutError:
        first = second = None
        given = f"nothing within {_SILENT_SECONDS:g} s"
    if first is None or second is not None:
        raise InvalidRequest.given("WatchTrainJobRequest", given, "one, then the end", "GRAMMAR")
    return first


def _message(job: Job) -> trainer_pb2.TrainJob:
    message = trainer_pb2.TrainJob(
        id=job.id,
        spec=trainer_pb2.TrainJobSpec.FromString(job.spec),
        state=names.JOB_STATES[job.state],
        waits_for=job.waits_for,
        step=job.step,
        checkpoints=map(_checkpoint, job.checkpoints),
    )
    if job.failure:
        message.failure.CopyFrom(types_pb2.Failure.FromString(job.failure))
    message.create_time.FromNanoseconds(round(job.created * 1e9))
    message.update_time.FromNanoseconds(round(job.updated * 1e9))
    return message


def _checkpoint(kept: Kept) -> trainer_pb2.TrainCheckpoint:
    message = trainer_pb2.TrainCheckpoint(
        step=kept.step,
        weights=training.digest(kept.weights),
        state=map(training.digest, kept.state),
        validation_loss=kept.validation_loss,
    )
    message.create_time.FromNanoseconds(round(kept.time * 1e9))
    return message


def _event(happened: Happened, job: Job) -> trainer_pb2.WatchTrainJobResponse | None:
    """What happened, with the job as it is by now; None for a checkpoint that is kept no more."""
    message = trainer_pb2.WatchTrainJobResponse(sequence=happened.sequence)
    message.event_time.FromNanoseconds(round(happened.time * 1e9))
    if happened.kind == CHECKPOINT:
        kept = [one for one in job.checkpoints if one.step == happened.step]
        if not kept:
            return None
        message.checkpoint.CopyFrom(_checkpoint(kept[0]))
    else:
        message.job.CopyFrom(_message(job))
    return message


def _samples(happened: Happened, drawn: list[Sampled]) -> trainer_pb2.WatchTrainJobResponse:
    message = trainer_pb2.WatchTrainJobResponse(
        sequence=happened.sequence,
        samples=trainer_pb2.TrainSamples(
            step=happened.step,
            pictures=[
                trainer_pb2.TrainPicture(
                    prompt=one.prompt,
                    picture=training.digest(one.picture),
                    lost_detail=one.lost_detail,
                )
                for one in drawn
            ],
        ),
    )
    message.event_time.FromNanoseconds(round(happened.time * 1e9))
    return message


def _caching(now: Caching) -> trainer_pb2.WatchTrainJobResponse:
    message = trainer_pb2.WatchTrainJobResponse(
        caching=trainer_pb2.TrainCaching(done=now.done, total=now.total)
    )
    message.event_time.GetCurrentTime()
    return message


def _kind(heap: keeping.Heap) -> trainer_pb2.CacheKind:
    return trainer_pb2.CacheKind(kind=heap.kind, count=heap.count, size_bytes=heap.size_bytes)


def _step(learnt: TrainStep) -> trainer_pb2.WatchTrainJobResponse:
    message = trainer_pb2.WatchTrainJobResponse()
    message.event_time.GetCurrentTime()
    step = message.step
    step.step, step.loss, step.gradient_norm = learnt.step, learnt.loss, learnt.gradient_norm
    step.learning_rate, step.skipped = learnt.learning_rate, learnt.skipped
    step.duration.FromNanoseconds(round(learnt.seconds * 1e9))
    step.waited.FromNanoseconds(round(learnt.waited_seconds * 1e9))
    if learnt.device_bytes is not None:
        step.device_bytes = learnt.device_bytes
    return message
