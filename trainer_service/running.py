"""Which job learns when, and what becomes of it when something breaks."""

import asyncio
import logging
import random
from collections.abc import Callable
from functools import partial

from trainer_service.feeding import Desk, Feeding
from trainer_service.jobs.jobs import (
    CANCELLED,
    COMPLETED,
    ENDED,
    FAILED,
    PAUSED,
    RUNNING,
    WAITING,
    Job,
)
from zimage_core.errors import InternalError, NotReady, Unavailable, ZImageError
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_core.wire import status
from zimage_rpc.trainer.v1 import trainer_pb2

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_OPEN_AGAIN = ("TRAINING_NOT_OPEN", "TRAINING_ORDER", "SESSION_REPLACED")
"""What another session from the last checkpoint mends."""


class Runner:
    """All jobs of a trainer, one after the other."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._feeding: dict[str, Feeding] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changed: dict[str, asyncio.Event] = {}

    async def run(self, on_ready: Callable[[bool], None]) -> None:
        """Goes on with what was left, then with what comes."""
        for job in await self._desk.aside(self._desk.jobs.unfinished):
            self._queue.put_nowait(job)
        on_ready(True)
        while True:
            job = await self._queue.get()
            self._running[job] = asyncio.create_task(self._see_through(job))
            try:
                await asyncio.wait([self._running[job]])
            finally:
                task = self._running.pop(job)
                task.cancel()
            if not task.cancelled() and (fault := task.exception()):
                _log.error("job %s broke the trainer's own part", job, exc_info=fault)
                await self._fail(job, InternalError("internal error; the trainer's log knows more"))

    def submit(self, job: str) -> None:
        """Lets a job learn when its turn comes."""
        self._queue.put_nowait(job)

    async def pause(self, job: Job) -> Job:
        """Lets it rest, behind a checkpoint where it learns now."""
        if job.state in ENDED:
            raise _ended(job)
        if feeding := self._feeding.get(job.id):
            feeding.shall_rest.set()
            return job
        return await self._change(job.id, PAUSED)

    async def resume(self, job: Job) -> Job:
        """Lets it go on."""
        if job.state in (COMPLETED, CANCELLED):
            raise _ended(job)
        if job.state in (PAUSED, FAILED):
            job = await self._change(job.id, WAITING)
            self.submit(job.id)
        return job

    async def cancel(self, job: Job) -> Job:
        """Ends it for good."""
        if job.state == COMPLETED:
            raise _ended(job)
        job = await self._change(job.id, CANCELLED)
        if task := self._running.get(job.id):
            task.cancel()
        return job

    def bell(self, job: str) -> asyncio.Event:
        """Rings when something happens to a job; whoever hears it asks for a new one."""
        return self._changed.setdefault(job, asyncio.Event())

    def ring(self, job: str) -> None:
        """Something has happened."""
        if bell := self._changed.pop(job, None):
            bell.set()

    async def _see_through(self, job_id: str) -> None:
        """Until it is done, rests, or cannot go on; waits for what is away."""
        failures = 0
        while True:
            job = await self._desk.aside(lambda: self._desk.jobs.read(job_id))
            if job.state not in (WAITING, RUNNING):
                return
            before = len(job.checkpoints)
            try:
                await self._end(job_id, await self._stretch(job))
                return
            except ZImageError as error:
                if not _may_pass(error):
                    await self._fail(job_id, error)
                    return
                _log.info("job %s waits: %s", job_id, error.message)
                await self._change(job_id, WAITING, waits_for=error.message)
            after = await self._desk.aside(lambda: self._desk.jobs.read(job_id))
            failures = 0 if len(after.checkpoints) > before else failures + 1
            longest = min(_FIRST_PAUSE_SECONDS * 2.0**failures, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - not in step

    async def _stretch(self, job: Job) -> bool:
        examples = await self._desk.aside(lambda: self._examples(job))
        feeding = self._feeding[job.id] = Feeding(self._desk, job, examples, self.ring)
        try:
            epoch = await self._desk.aside(lambda: self._desk.jobs.begin_session(job.id))
            return await feeding.run(epoch, partial(self._opened, feeding))
        finally:
            del self._feeding[job.id]

    async def _opened(self, feeding: Feeding) -> None:
        job = await self._change(feeding.job_id, RUNNING)
        if job.state != RUNNING:  # somebody wanted it to rest meanwhile
            feeding.shall_rest.set()

    def _examples(self, job: Job) -> tuple[Example, ...]:
        spec = trainer_pb2.TrainJobSpec.FromString(job.spec)
        with self._desk.blobs.open(spec.dataset.sha256) as file:
            return dataset_file.load(file.read())

    async def _end(self, job: str, is_done: bool) -> None:
        if not is_done:
            await self._change(job, PAUSED)
            return
        await self._publish(job)
        await self._change(job, COMPLETED)

    async def _publish(self, job_id: str) -> None:
        """Gives the last checkpoint the job's name as an adapter."""
        job = await self._desk.aside(lambda: self._desk.jobs.read(job_id))
        spec = trainer_pb2.TrainJobSpec.FromString(job.spec)
        last = job.checkpoints[-1]
        file = await self._desk.aside(lambda: self._desk.blobs.local(last.adapter.sha256))
        await self._desk.client.add_adapter(spec.name, file, replace=True)

    async def _fail(self, job: str, error: ZImageError) -> None:
        failure = status.to_failure(error).SerializeToString()
        await self._change(job, FAILED, failure=failure)

    async def _change(
        self, job: str, state: str, *, waits_for: str = "", failure: bytes = b""
    ) -> Job:
        changed = await self._desk.aside(
            lambda: self._desk.jobs.change(job, state, waits_for=waits_for, failure=failure)
        )
        self.ring(job)
        return changed


def _may_pass(error: ZImageError) -> bool:
    """Whether it is worth to go on from the last checkpoint."""
    return isinstance(error, Unavailable) or error.reason in _OPEN_AGAIN


def _ended(job: Job) -> NotReady:
    return NotReady(
        f"job {job.id} is {job.state}: it does not go on",
        reason="JOB_ENDED",
        fields={"field": "id", "given": job.id},
    )
