"""Training on the wire: batches come in, with the files they name; what came of them goes out."""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import grpc.aio

from dit_service import messages
from dit_service.rpc.arrivals import Arrivals
from dit_service.rpc.describe import numeric_plan
from zimage_core.errors import InvalidRequest, NotReady, Overloaded, Unavailable
from zimage_core.planning.shares import BACKGROUND, Share
from zimage_core.planning.training import TrainingPlan
from zimage_core.serving import access
from zimage_core.serving.worker import Worker
from zimage_core.store.blobs import Blobs, check_name
from zimage_core.wire import training as plans
from zimage_rpc.dit.v1 import dit_pb2, training_pb2, training_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

_log = logging.getLogger(__name__)

_BATCHES_AHEAD = 2
"""One is worked on while the next is there already."""
_MOST_SAMPLES = 256
_SILENT_SECONDS = 30.0
_ROOM_SECONDS = 5.0
"""Until the next look whether the store has room."""
_REMEMBERED_JOBS = 1000
_MEDIA_TYPE = "application/vnd.safetensors"

_Context = grpc.aio.ServicerContext[Any, Any]
_Request = training_pb2.TrainSessionRequest
_Response = training_pb2.TrainSessionResponse


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Hands trainings to the worker."""

    def __init__(self, worker: Worker, blobs: Blobs) -> None:
        self._worker = worker
        self._blobs = blobs
        self._epochs: OrderedDict[str, int] = OrderedDict()
        """The latest stretches of jobs of late."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self._sessions: set[_Session] = set()
        self._is_leaving = False

    async def leave(self) -> None:
        """Lets every training take a checkpoint, to go on elsewhere."""
        self._is_leaving = True
        running = list(self._running.values())
        for session in self._sessions:
            session.shall_leave.set()
        if running:
            await asyncio.wait(running)

    async def TrainSession(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[_Request], context: _Context
    ) -> AsyncIterator[_Response]:
        """From the opening to the last checkpoint; when the call ends, so does the session."""
        try:
            async with asyncio.timeout(_SILENT_SECONDS):
                first = await anext(request_iterator, None)
        except TimeoutError:
            raise _refusal(f"nothing within {_SILENT_SECONDS:g} s") from None
        if first is None or first.WhichOneof("payload") != "open":
            raise _refusal("no open in the first")
        if self._is_leaving:
            raise _stopping()
        name = self._name(first.open)
        session = _Session(name, request_iterator, self._worker, self._blobs)
        job = self._job(first.open)
        running = self._running[job] = asyncio.create_task(session.run(first.open))
        running.add_done_callback(lambda _done: session.told.put_nowait(None))
        self._sessions.add(session)
        try:
            for sequence in count(1):
                answer = await session.told.get()
                if answer is None:
                    break
                answer.sequence = sequence
                answer.event_time.GetCurrentTime()
                yield answer
            if running.cancelled():
                raise _replaced(first.open)
            running.result()  # raises what ended it
        finally:
            self._sessions.discard(session)
            running.cancel()
            if self._running.get(job) is running:
                del self._running[job]
            await asyncio.wait([running])
            await asyncio.shield(session.close())

    def _job(self, opening: training_pb2.OpenTraining) -> str:
        """Jobs of two projects have nothing to do with each other."""
        return f"{access.project()}/{check_name(opening.job, 'open.job')}"

    def _name(self, opening: training_pb2.OpenTraining) -> str:
        """The session's own; an earlier stretch of its job is over. Raises NotReady for a stretch
        that is over itself, whoever comes back with it."""
        job, epoch = self._job(opening), opening.session_epoch
        if epoch <= self._epochs.get(job, 0):
            raise _replaced(opening)
        self._epochs[job] = epoch
        self._epochs.move_to_end(job)
        while len(self._epochs) > _REMEMBERED_JOBS:
            self._epochs.popitem(last=False)
        if earlier := self._running.get(job):
            earlier.cancel()
        return f"{job}/{epoch}"


class _Session:
    """One call's."""

    def __init__(
        self, name: str, requests: AsyncIterator[_Request], worker: Worker, blobs: Blobs
    ) -> None:
        self.told: asyncio.Queue[_Response | None] = asyncio.Queue()
        """What the client shall hear; None is the end."""
        self.shall_leave = asyncio.Event()
        """Whether it ends soon, behind a checkpoint."""
        self._requests = requests
        self._worker = worker
        self._blobs = blobs
        self._arrivals = Arrivals(blobs, self._need)
        self._asked: asyncio.Queue[_Request | None] = asyncio.Queue()
        self._opened = asyncio.Event()
        self._next_step = self._learnt_step = 0
        self._about: dict[str, str] = {}
        self._unanswered = 0
        self._name = name

    async def run(self, opening: training_pb2.OpenTraining) -> None:
        """Until all that was asked is answered; raises the first error, and ends the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._answer(opening, group))
        except BaseExceptionGroup as errors:
            raise _first_of(errors) from None

    async def _read(self) -> None:
        async for request in self._requests:
            match request.WhichOneof("payload"):
                case "chunk":
                    await self._arrivals.take(request.chunk)
                case "batch":
                    self._count(request.batch)
                    self._asked.put_nowait(request)
                case "checkpoint":
                    self._count_in()
                    self._asked.put_nowait(request)
                case other:
                    raise _refusal(other or "nothing in one")
        self._asked.put_nowait(None)

    def _count(self, batch: training_pb2.TrainBatch) -> None:
        self._count_in()
        if batch.step != self._next_step:
            raise InvalidRequest.given("batch.step", batch.step, f"{self._next_step}", "GRAMMAR")
        if not 1 <= len(batch.samples) <= _MOST_SAMPLES:
            given = f"{len(batch.samples)} samples"
            raise InvalidRequest.given("batch.samples", given, f"1 to {_MOST_SAMPLES}", "GRAMMAR")
        self._next_step += 1

    def _count_in(self) -> None:
        if not self._opened.is_set():
            raise _refusal("a batch or checkpoint before the training was opened")
        if self._unanswered == _BATCHES_AHEAD:
            raise _refusal(f"more than {_BATCHES_AHEAD} batches and checkpoints ahead")
        self._unanswered += 1

    async def _answer(self, opening: training_pb2.OpenTraining, group: asyncio.TaskGroup) -> None:
        """What was asked, in its order. A checkpoint is of what came before it and nothing else."""
        await self._open(opening)
        learning: list[asyncio.Task[None]] = []
        first_step = self._next_step
        while (request := await self._next()) is not None:
            if request.HasField("batch"):
                samples = await self._samples(request.batch)
                share = Share(access.project(), BACKGROUND)
                step = self._learn(messages.Learn(self._name, request.batch.step, samples, share))
                learning = [
                    *(task for task in learning if not task.done()),
                    group.create_task(step),
                ]
            else:
                await asyncio.gather(*learning)
                await self._take_checkpoint()
                self._unanswered -= 1
        await asyncio.gather(*learning)
        if self.shall_leave.is_set():
            if self._learnt_step > first_step:
                await self._take_checkpoint(leaving=True)
                while await self._asked.get() is not None:
                    pass  # the client ends when it has fetched what is here
            raise _stopping()

    async def _next(self) -> _Request | None:
        """What is asked next; None when that is all, or it is time to leave."""
        leaving = asyncio.create_task(self.shall_leave.wait())
        asked = asyncio.create_task(self._asked.get())
        try:
            await asyncio.wait({leaving, asked}, return_when=asyncio.FIRST_COMPLETED)
            return None if leaving.done() else asked.result()
        finally:
            leaving.cancel()
            asked.cancel()

    async def close(self) -> None:
        """Nobody goes on with it."""
        self._arrivals.close()
        with suppress(Unavailable):  # a worker that died has forgotten it
            async for _ in self._worker.call(messages.CloseTraining(self._name)):
                pass

    async def _open(self, opening: training_pb2.OpenTraining) -> None:
        model = self._worker.loaded(messages.Model)
        plan = plans.plan(opening.plan, model.shape, "open.plan")
        beside = None
        state = [path for _, path in await self._arrivals.files(opening.state)]
        if plan.beside:
            [(_, beside)] = await self._arrivals.files([opening.plan.beside.digest])
        self._about = _about(plan, model)
        opened = await self._one(messages.OpenTraining(self._name, plan, tuple(state), beside))
        assert isinstance(opened, messages.TrainingOpened)
        self._next_step = opened.step
        self._opened.set()
        self._tell(
            opened=training_pb2.TrainingOpened(
                plan=plans.message(plan),
                step=opened.step,
                parameter_count=opened.parameter_count,
                batches_ahead=_BATCHES_AHEAD,
                numeric_plan=numeric_plan(model),
            )
        )

    async def _samples(self, batch: training_pb2.TrainBatch) -> tuple[messages.TrainSample, ...]:
        """With their files on this machine."""
        latents = await self._arrivals.files([sample.latents for sample in batch.samples])
        captions = await self._arrivals.files([sample.caption for sample in batch.samples])
        weights = [sample.weight if sample.HasField("weight") else 1.0 for sample in batch.samples]
        for index, weight in enumerate(weights):
            if not 0 < weight < float("inf"):
                field = f"batch.samples[{index}].weight"
                raise InvalidRequest.given(field, weight, "a number above 0", "TRAIN_SAMPLE")
        return tuple(
            messages.TrainSample(*three) for three in zip(latents, captions, weights, strict=True)
        )

    async def _learn(self, asked: messages.Learn) -> None:
        learnt = await self._one(asked)
        assert isinstance(learnt, messages.Learnt)
        self._unanswered -= 1
        self._learnt_step = learnt.step + 1
        report = training_pb2.StepReport(
            step=learnt.step,
            loss=learnt.loss,
            gradient_norm=learnt.gradient_norm,
            learning_rate=learnt.learning_rate,
            skipped=not learnt.is_taken,
        )
        report.duration.FromNanoseconds(round(learnt.seconds * 1e9))
        report.waited.FromNanoseconds(round(learnt.waited_seconds * 1e9))
        self._tell(step=report)

    async def _take_checkpoint(self, *, leaving: bool = False) -> None:
        with self._blobs.making() as folder:
            taken = await self._one(messages.TakeCheckpoint(self._name, folder, self._about))
            assert isinstance(taken, messages.Checkpoint)
            weights, *state = [await self._adopt(file) for file in (taken.weights, *taken.state)]
        self._tell(
            checkpoint=training_pb2.CheckpointReady(
                step=taken.step,
                weights=_digest(*weights),
                state=[_digest(*part) for part in state],
                leaving=leaving,
            )
        )

    async def _adopt(self, file: Path) -> tuple[str, int]:
        """When there is room: what was learnt for it is worth the wait."""
        while True:
            try:
                return await asyncio.to_thread(self._blobs.adopt, file)
            except Overloaded as error:
                _log.warning("a checkpoint of %s waits: %s", self._name, error.message)
            await asyncio.sleep(_ROOM_SECONDS)

    async def _one(self, asked: object) -> object:
        """What the worker answers to what has one answer."""
        [answer] = [event async for event in self._worker.call(asked)]
        return answer

    def _need(self, digests: list[types_pb2.Digest]) -> None:
        self._tell(need=dit_pb2.Need(digests=digests))

    def _tell(self, **event: Any) -> None:
        self.told.put_nowait(_Response(**event))


def _about(plan: TrainingPlan, model: messages.Model) -> dict[str, str]:
    """What the file of what was learnt says of itself. The strength of an adapter is in its
    weights: as the file is, alpha is the rank, whatever it was in the plan."""
    about = {
        "model_type": "zimage",
        "base_model": f"{model.name} ({model.variant})",
        "training_plan": json.dumps(asdict(plan)),
    }
    if plan.lora:
        rank = str(max(group.rank for group in plan.lora))
        about |= {"lora_rank": rank, "lora_alpha": rank}
    return about


def _digest(sha256: str, size_bytes: int) -> types_pb2.Digest:
    return types_pb2.Digest(sha256=sha256, size_bytes=size_bytes, media_type=_MEDIA_TYPE)


def _stopping() -> Unavailable:
    return Unavailable("the service is being stopped", reason="STOPPING", retry_after=1.0)


def _replaced(opening: training_pb2.OpenTraining) -> NotReady:
    return NotReady(
        f"stretch {opening.session_epoch} of {opening.job} is over: a later one was opened",
        reason="SESSION_REPLACED",
        fields={"field": "open.session_epoch", "given": str(opening.session_epoch)},
    )


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _refusal(given: str) -> InvalidRequest:
    allowed = "open; once it is opened, batches and checkpoints; what is needed at any time"
    return InvalidRequest.given("messages of TrainSession", given, allowed, "GRAMMAR")
