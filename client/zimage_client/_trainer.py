"""The client of a trainer service."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Self, Unpack

from zimage_client import _calls, _jobs
from zimage_client._blobs import Transfers
from zimage_client._channel import Channels
from zimage_client._jobs import CacheKind, JobEvent, TrainForecast, TrainJob, TrainStep
from zimage_client._replay import Replay
from zimage_core.errors import ZImageError
from zimage_core.tls import Credentials
from zimage_core.wire import request_id
from zimage_rpc.trainer.v1 import trainer_pb2, trainer_pb2_grpc

_log = logging.getLogger(__name__)

_QUIET_SECONDS = 5.0


class AsyncTrainer:
    """Talks to a trainer service, which owns jobs: they go on whoever listens."""

    def __init__(self, address: str, **credentials: Unpack[Credentials]) -> None:
        """The address is "host:port" or "unix:path", as of the other clients."""
        self._channels = Channels(trainer=address, **credentials)
        self._warned: set[str] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connections."""
        await self._channels.close()

    async def put_blob(self, file: str | Path) -> str:
        """Sends a file to the trainer's store, unless it is there; its SHA-256 names it."""
        return await self._transfers().put(Path(file), Replay())

    async def find_blobs(self, digests: Iterable[str]) -> set[str]:
        """Those that the trainer has."""
        return await self._transfers().find(digests, _calls.DESCRIBE_SECONDS)

    async def get_blob(self, sha256: str, file: str | Path) -> None:
        """Writes a file of the trainer's store, such as a checkpoint's."""
        await self._transfers().get(sha256, Path(file), Replay())

    async def plan(self, spec: trainer_pb2.TrainJobSpec) -> TrainForecast:
        """What a job would be, take and last: of what it names, the pictures need not be put."""
        request = trainer_pb2.PlanTrainJobRequest(spec=spec)
        answer = await self._asked(lambda stub, **how: stub.PlanTrainJob(request, **how))
        self._warn(answer.warnings)
        return _jobs.forecast(answer)

    async def train(self, spec: trainer_pb2.TrainJobSpec) -> TrainJob:
        """Begins a job with what was put before; sending it again after a break begins no other."""
        request = trainer_pb2.CreateTrainJobRequest(spec=spec, request_id=request_id.fresh())
        answer = await self._asked(lambda stub, **how: stub.CreateTrainJob(request, **how))
        self._warn(answer.warnings)
        return _jobs.job(answer.job)

    async def get(self, job: str) -> TrainJob:
        """A job as it is."""
        request = trainer_pb2.GetTrainJobRequest(id=job)
        answer = await self._asked(lambda stub, **how: stub.GetTrainJob(request, **how))
        return _jobs.job(answer.job)

    async def jobs(self) -> list[TrainJob]:
        """All, the latest first."""
        found: list[TrainJob] = []
        request = trainer_pb2.ListTrainJobsRequest()
        while True:
            page = await self._asked(lambda stub, **how: stub.ListTrainJobs(request, **how))
            found += map(_jobs.job, page.jobs)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def pause(self, job: str) -> TrainJob:
        """Lets it rest behind its next checkpoint, which is made soon."""
        request = trainer_pb2.PauseTrainJobRequest(id=job)
        answer = await self._asked(lambda stub, **how: stub.PauseTrainJob(request, **how))
        return _jobs.job(answer.job)

    async def resume(self, job: str) -> TrainJob:
        """Lets one that rests or failed go on from its last checkpoint."""
        request = trainer_pb2.ResumeTrainJobRequest(id=job)
        answer = await self._asked(lambda stub, **how: stub.ResumeTrainJob(request, **how))
        return _jobs.job(answer.job)

    async def cancel(self, job: str) -> TrainJob:
        """Ends it for good; its checkpoints stay."""
        request = trainer_pb2.CancelTrainJobRequest(id=job)
        answer = await self._asked(lambda stub, **how: stub.CancelTrainJob(request, **how))
        return _jobs.job(answer.job)

    async def delete(self, job: str) -> None:
        """Takes away one that has ended, with its checkpoints."""
        request = trainer_pb2.DeleteTrainJobRequest(id=job)
        await self._asked(lambda stub, **how: stub.DeleteTrainJob(request, **how))

    async def cache(self) -> list[CacheKind]:
        """What the trainer keeps of captions and pictures."""
        request = trainer_pb2.DescribeCacheRequest()
        answer = await self._asked(lambda stub, **how: stub.DescribeCache(request, **how))
        return list(map(_jobs.cache_kind, answer.kinds))

    async def verify_cache(self) -> AsyncGenerator[tuple[int, list[str]], None]:
        """Has all of it read: how many were by now, and those just found that were not what they
        should be and are gone."""
        request, count = trainer_pb2.VerifyCacheRequest(), 0
        while True:
            page = await self._asked(lambda stub, **how: stub.VerifyCache(request, **how))
            count += page.count
            yield count, list(page.torn)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def prune_cache(
        self, unused_seconds: float | None = None, most_bytes: int | None = None
    ) -> list[CacheKind]:
        """Takes away what was not used for so long, and the longest unused until the rest takes so
        many bytes; 30 days if nothing is said. What is gone."""
        request = trainer_pb2.PruneCacheRequest(most_bytes=most_bytes)
        if unused_seconds is not None:
            request.unused_for.FromNanoseconds(round(unused_seconds * 1e9))
        answer = await self._asked(lambda stub, **how: stub.PruneCache(request, **how))
        return list(map(_jobs.cache_kind, answer.kinds))

    async def watch(self, job: str, *, only_past: bool = False) -> AsyncGenerator[JobEvent, None]:
        """What has happened to a job, then, unless only the past is asked for, what happens until
        it ends; goes on over breaks."""
        request = trainer_pb2.WatchTrainJobRequest(id=job, only_past=only_past)
        replay, same_id = Replay(), self._channels.metadata()
        while True:
            began = time.monotonic()
            try:
                with self._channels.trainer.one_try() as channel:
                    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
                    call = stub.WatchTrainJob(iter([request]), metadata=same_id)
                    try:
                        with _calls.TypedErrors(call):
                            async for message in call:
                                replay.advanced()
                                event = _jobs.event(message)
                                if message.sequence:
                                    request.after_sequence = message.sequence
                                if isinstance(event, TrainStep):
                                    request.after_step = event.step
                                if event is not None:
                                    yield event
                        return
                    finally:
                        call.cancel()  # without effect on a call that has ended
                        del call
            except ZImageError as error:
                if time.monotonic() - began > _QUIET_SECONDS:  # it was there; nothing happened
                    replay = Replay()
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)

    def _warn(self, warnings: Iterable[str]) -> None:
        """Once of each."""
        for warning in warnings:
            if warning not in self._warned:
                _log.warning(warning)
                self._warned.add(warning)

    def _transfers(self) -> Transfers:
        return Transfers(self._channels.trainer, self._channels.metadata())

    async def _asked(self, call: Callable[..., Awaitable[Any]]) -> Any:
        """What a short call answers; tried again where that can help."""
        replay, same_id = Replay(timeout=_calls.ADAPTER_SECONDS), self._channels.metadata()
        while True:
            try:
                with self._channels.trainer.one_try() as channel, _calls.TypedErrors():
                    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
                    return await call(stub, timeout=replay.within(None), metadata=same_id)
            except ZImageError as error:
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)
