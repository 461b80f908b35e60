"""Which job learns when, and what becomes of it when something breaks."""

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from trainer_service.desk import Desk, is_passing, pause_seconds, publish
from trainer_service.feeding import Feeding
from trainer_service.jobs.database import Database
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
from trainer_service.keeping import (
    BESIDE,
    CHECKPOINTS,
    DATASETS,
    PICTURES,
    START,
    Heap,
    file_name,
    forget_job,
    prune,
)
from trainer_service.preparing import Caching
from zimage_core.errors import (
    DeviceLost,
    InternalError,
    NotFound,
    NotReady,
    Unavailable,
    ZImageError,
)
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_core.wire import status
from zimage_rpc.trainer.v1 import trainer_pb2

_log = logging.getLogger(__name__)

_STANDING_BY_SECONDS = 1.0
_LONG = 10
"""As if so many tries had failed."""
_MOST_LOSSES = 5
"""Of the device without a new checkpoint between: a job that kills it must not go on for ever."""
_OF_THE_DEVICE = ("DEVICE_MEMORY",)
"""What somebody else's picture may have taken: it counts as a loss."""
_OPEN_AGAIN = ("TRAINING_NOT_OPEN", "TRAINING_ORDER", "SESSION_REPLACED")
"""What another session from the last checkpoint mends."""


class Runner:
    """All jobs of a trainer, so many at once."""

    def __init__(self, desk: Desk, database: Database, at_once: int) -> None:
        self._desk = desk
        self._database = database
        self._free = asyncio.Semaphore(at_once)
        self._again: set[str] = set()
        """Those that came while they had their turn."""
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._feeding: dict[str, Feeding] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._resting: dict[str, str] = {}
        """Those that shall rest, also when what they do now breaks, and why where nobody asked."""
        self._naming = threading.Lock()
        """Held while names are given to what a job needs, and while those of no job go."""
        self._is_active = False
        self.is_leaving = False
        """Whether the trainer is about to stop: nobody waits for news any more."""

    async def run(self, on_ready: Callable[[bool], None]) -> None:
        """Goes on with what was left, then with what comes; stands by while another trainer has the
        database."""
        await self._take_over()
        self._is_active = True
        for job in await self._desk.aside(self._desk.jobs.unfinished):
            self._queue.put_nowait(job)
        on_ready(True)
        try:
            while True:
                await self._free.acquire()
                job = await self._queue.get()
                if self.is_leaving or job in self._running:
                    self._again.add(job)
                    self._free.release()
                    continue
                self._running[job] = asyncio.create_task(self._turn(job))
                self._running[job].add_done_callback(partial(self._end_turn, job))
        finally:
            for task in self._running.values():
                task.cancel()

    async def _take_over(self) -> None:
        is_told = False
        while not await self._desk.aside(self._database.take):
            if not is_told:
                _log.warning("another trainer has the database: this one stands by")
            is_told = True
            await asyncio.sleep(_STANDING_BY_SECONDS)

    async def _turn(self, job: str) -> None:
        """Whatever is wrong with the database passes."""
        fault: Exception | None = None
        while True:
            try:
                if fault is None:
                    await self._see_through(job)
                else:
                    await self._fail(job, InternalError("internal error; the log knows more"))
                return
            except NotFound:  # it was deleted meanwhile
                return
            except Unavailable as error:
                _log.warning("job %s waits: %s", job, error.message)
            except Exception as error:  # noqa: BLE001 - the others go on
                _log.error("job %s broke the trainer's own part", job, exc_info=error)
                fault = error
            await asyncio.sleep(pause_seconds(_LONG))

    def _end_turn(self, job: str, _task: asyncio.Task[None]) -> None:
        """Also of one that never began."""
        del self._running[job]
        self._desk.places.pop(job, None)
        self._free.release()
        if job in self._again:
            self._again.discard(job)
            self._submit(job)

    def refuse_standing_by(self) -> None:
        """Raises Unavailable while another trainer has the jobs."""
        if not self._is_active:
            raise Unavailable(
                "another trainer has the jobs; this one stands by",
                reason="STANDING_BY",
                retry_after=_STANDING_BY_SECONDS,
            )

    async def leave(self) -> None:
        """Lets the job at hand take a checkpoint, to go on from at the next start."""
        self.is_leaving = True
        for job in list(self._changed):
            self.ring(job)
        for job, task in self._running.items():
            if feeding := self._feeding.get(job):
                feeding.shall_rest.set()
            else:
                task.cancel()
        if self._running:
            await asyncio.wait(list(self._running.values()))

    async def begin(self, job: str) -> None:
        """Keeps what a job needs, then lets it learn when its turn comes."""
        await self._desk.aside(lambda: self._examples(self._desk.jobs.read(job)))
        self._submit(job)

    def _submit(self, job: str) -> None:
        """More than once is once: who comes to the end of its turn is left alone then."""
        self._queue.put_nowait(job)

    def prune(self, unused_seconds: float, most_bytes: int | None) -> list[Heap]:
        """Takes away what nobody needed for long, or is too much."""
        with self._naming:
            return prune(self._desk.blobs, self._desk.jobs, unused_seconds, most_bytes)

    async def pause(self, job: Job) -> Job:
        """Lets it rest, behind a checkpoint where it learns now."""
        if job.state in ENDED:
            raise _ended(job)
        if job.id in self._running:
            self.rests(job.id)
            return job
        return await self._change(job.id, PAUSED)

    def rests(self, job: str, why: str = "") -> None:
        """It shall rest behind its next checkpoint, which comes soon then."""
        self._resting[job] = why
        if feeding := self._feeding.get(job):
            feeding.shall_rest.set()

    async def resume(self, job: Job) -> Job:
        """Lets it go on."""
        if job.state in (COMPLETED, CANCELLED):
            raise _ended(job)
        if job.id in self._resting and (feeding := self._feeding.get(job.id)):
            feeding.shall_rest.clear()
        self._resting.pop(job.id, None)
        if job.state in (PAUSED, FAILED):
            job = await self._change(job.id, WAITING, wakes=True)
            self._submit(job.id)
        return job

    async def cancel(self, job: Job) -> Job:
        """Ends it for good."""
        if job.state == COMPLETED:
            raise _ended(job)
        job = await self._change(job.id, CANCELLED)
        if task := self._running.get(job.id):
            task.cancel()
        return job

    async def delete(self, job: Job) -> None:
        """Forgets one that has ended."""
        if job.state in ENDED and (ending := self._running.get(job.id)):
            await asyncio.wait([ending])
        if job.state not in ENDED:
            raise NotReady(
                f"job {job.id} is {job.state}; cancel it first",
                reason="JOB_NOT_ENDED",
                fields={"field": "id", "given": job.id},
            )
        await self._desk.aside(lambda: self._desk.jobs.delete(job.id))
        await self._desk.aside(lambda: forget_job(self._desk.blobs, job.id))
        self.ring(job.id)

    def caching(self, job: str) -> Caching | None:
        """How far it is with what is encoded first; None where it does no such thing."""
        feeding = self._feeding.get(job)
        return feeding.preparing.caching if feeding else None

    def bell(self, job: str) -> asyncio.Event:
        """Rings when something happens to a job; whoever hears it asks for a new one."""
        return self._changed.setdefault(job, asyncio.Event())

    def ring(self, job: str) -> None:
        """Something has happened."""
        if bell := self._changed.pop(job, None):
            bell.set()

    async def _see_through(self, job_id: str) -> None:
        """Until it is done, rests, or cannot go on; waits for what is away."""
        failures = losses = 0
        while True:
            try:
                job = await self._desk.aside(lambda: self._desk.jobs.read(job_id))
            except NotFound:  # it was deleted while it waited for its turn
                return
            if job.state not in (WAITING, RUNNING):
                return
            if await self._rests(job_id):
                return
            if self.is_leaving:
                await self._change(job_id, WAITING, waits_for="the trainer was stopped")
                return
            before = len(job.checkpoints)
            try:
                if await self._stretch(job):
                    await self._publish_last(job_id)
                    await self._change(job_id, COMPLETED)
                    return
                continue
            except ZImageError as error:
                losses += isinstance(error, DeviceLost) or error.reason in _OF_THE_DEVICE
                may_pass = is_passing(error) or error.reason in (*_OPEN_AGAIN, *_OF_THE_DEVICE)
                if not may_pass or losses > _MOST_LOSSES:
                    await self._fail(job_id, error)
                    return
                await self.waits(job_id, error)
            after = await self._desk.aside(lambda: self._desk.jobs.read(job_id))
            has_come_further = len(after.checkpoints) > before
            failures = 0 if has_come_further else failures + 1
            losses = 0 if has_come_further else losses
            await asyncio.sleep(pause_seconds(failures))

    async def _stretch(self, job: Job) -> bool:
        examples = await self._desk.aside(lambda: self._examples(job))
        feeding = await self._desk.aside(lambda: Feeding(self._desk, job, examples, self))
        self._feeding[job.id] = feeding
        if job.id in self._resting or self.is_leaving:
            feeding.shall_rest.set()
        try:
            epoch = await self._desk.aside(lambda: self._desk.jobs.begin_session(job.id))
            return await feeding.run(epoch)
        finally:
            del self._feeding[job.id]

    async def runs(self, job: str) -> None:
        """It learns now."""
        changed = await self._change(job, RUNNING)
        if changed.state != RUNNING:  # somebody wanted it to rest meanwhile
            self._feeding[job].shall_rest.set()

    async def waits(self, job: str, error: ZImageError) -> None:
        """It has to wait."""
        _log.info("job %s waits: %s", job, error.message)
        await self._change(job, WAITING, waits_for=error.message)

    def _examples(self, job: Job) -> tuple[Example, ...]:
        """What it learns from; the store keeps it, and all else that the job needs, from now on."""
        with self._naming:
            return self._named_examples(job)

    def _named_examples(self, job: Job) -> tuple[Example, ...]:
        spec = trainer_pb2.TrainJobSpec.FromString(job.spec)
        dataset, blobs = spec.dataset.sha256, self._desk.blobs
        blobs.point(DATASETS, job.id, dataset)
        if spec.training.HasField("beside"):
            name = file_name(job.id, 0, BESIDE)
            blobs.point(CHECKPOINTS, name, spec.training.beside.digest.sha256)
        if spec.HasField("start"):
            for number, part in enumerate(spec.start.state):
                name = file_name(job.id, number, START)
                blobs.point(CHECKPOINTS, name, part.sha256)
        with blobs.open(dataset) as file:
            examples = dataset_file.load(file.read())
        kept = set(blobs.names(PICTURES))
        for sha256 in dict.fromkeys(file for one in examples for file in one.files):
            if sha256 not in kept:
                blobs.point(PICTURES, sha256, sha256)
        return examples

    async def _rests(self, job: str) -> bool:
        """Lets one rest that somebody wants to."""
        if job not in self._resting:
            return False
        await self._change(job, PAUSED, waits_for=self._resting.pop(job))
        return True

    async def _publish_last(self, job_id: str) -> None:
        job = await self._desk.aside(lambda: self._desk.jobs.read(job_id))
        spec = trainer_pb2.TrainJobSpec.FromString(job.spec)
        if not spec.only_caches and not spec.training.full:
            await publish(self._desk, spec.name, job.best)

    async def _fail(self, job: str, error: ZImageError) -> None:
        failure = status.to_failure(error).SerializeToString()
        await self._change(job, FAILED, failure=failure)

    async def _change(self, job: str, state: str, **more: Any) -> Job:
        changed = await self._desk.aside(lambda: self._desk.jobs.change(job, state, **more))
        self.ring(job)
        return changed


def _ended(job: Job) -> NotReady:
    return NotReady(
        f"job {job.id} is {job.state}: it does not go on",
        reason="JOB_ENDED",
        fields={"field": "id", "given": job.id},
    )
