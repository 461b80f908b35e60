"""A training as its client knows it: what is asked goes to the worker in its order, and what came
of it is kept until the client has heard of it, also one whose connection broke."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from dit_service import messages
from dit_service.rpc.arrivals import Arrivals
from dit_service.rpc.battery import Battery
from dit_service.rpc.describe import numeric_plan
from zimage_core.errors import InvalidRequest, Overloaded, Unavailable, ZImageError
from zimage_core.planning.shares import Share
from zimage_core.planning.training import TrainingPlan
from zimage_core.serving.worker import Worker
from zimage_core.store.blobs import Blobs
from zimage_core.wire import training as plans
from zimage_rpc.dit.v1 import dit_pb2, training_pb2
from zimage_rpc.types.v1 import types_pb2

_log = logging.getLogger(__name__)

_BATCHES_AHEAD = 2
"""One is worked on while the next is there already."""
_MOST_SAMPLES = 256
_ROOM_SECONDS = 5.0
"""Until the next look whether the store has room."""
_REMEMBERED_STEPS = 10_000
_MEDIA_TYPE = "application/vnd.safetensors"

Request = training_pb2.TrainSessionRequest
Response = training_pb2.TrainSessionResponse
T = TypeVar("T")


class _ClientGone(Exception):
    """Nobody sends what was asked for."""


class TrainingSession:
    """From its opening to the end of its last call."""

    def __init__(
        self,
        name: str,
        share: Share,
        worker: Worker,
        blobs: Blobs,
        make_room: Callable[[], Awaitable[bool]],
    ) -> None:
        """`make_room` ends those that nobody listens to; whether there were any."""
        self.told: asyncio.Queue[Response | None] = asyncio.Queue()
        """What the client of the moment shall hear; None is the end."""
        self.shall_leave = asyncio.Event()
        """Whether it ends soon, behind a checkpoint."""
        self.client_is_gone = asyncio.Event()
        """Whether its client is gone: what was sent is learnt, and no more."""
        self._name = name
        self._share = share
        self._worker = worker
        self._blobs = blobs
        self._make_room = make_room
        self._arrivals = Arrivals(blobs, self._need)
        self._asked: asyncio.Queue[Request | None] = asyncio.Queue()
        self._opened: training_pb2.TrainingOpened | None = None
        self._plan: TrainingPlan | None = None
        self.is_ended = False
        """Whether its client has said that it does not come back."""
        self._next_step = self._learnt_step = 0
        self._kept_step = 0
        """Behind which there is a checkpoint."""
        self._reports: deque[training_pb2.StepReport] = deque(maxlen=_REMEMBERED_STEPS)
        self._evaluations: list[training_pb2.EvaluationReport] = []
        """Of the latest step that had any."""
        self._checkpoint: training_pb2.CheckpointReady | None = None
        self._about: dict[str, str] = {}
        self._unanswered = 0
        self._battery = Battery()

    def can_go_on(self, opening: training_pb2.OpenTraining) -> bool:
        """Whether what a client asks for is what there is here, and what it does not know of is
        remembered."""
        if self._opened is None or self._plan is None or not opening.HasField("known_step_count"):
            return False
        model = self._worker.loaded(messages.Model)
        remembered = self._reports[0].step if self._reports else self._learnt_step
        is_known = remembered <= opening.known_step_count <= self._learnt_step
        given = plans.plan(opening.plan, model.shape, "open.plan")
        decided = replace(
            given,
            samples_at_once=given.samples_at_once or self._plan.samples_at_once,
            recompute=given.recompute or self._plan.recompute,
        )
        return is_known and decided == self._plan

    async def run(
        self, opening: training_pb2.OpenTraining, requests: AsyncIterator[Request]
    ) -> None:
        """Until all that was asked is answered, or the client is gone; raises the first error, and
        ends the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read(requests))
                await self._answer(opening, group)
                reading.cancel()
        except BaseExceptionGroup as errors:
            raise _first_of(errors) from None

    def take_up(self, opening: training_pb2.OpenTraining) -> None:
        """Another call goes on with it, whose client hears what it has not heard of."""
        self._arrivals.close()
        self.told = asyncio.Queue()
        self.client_is_gone = asyncio.Event()
        self.shall_leave = asyncio.Event()
        self._asked = asyncio.Queue()
        self._arrivals = Arrivals(self._blobs, self._need)
        self._unanswered = 0
        self._next_step = self._learnt_step
        for report in self._reports:
            if report.step >= opening.known_step_count:
                report.ClearField("battery_percent")  # it was that of then
                self._tell(step=report)
        known, kept = [part.sha256 for part in opening.state], self._checkpoint
        is_new = kept is not None and [part.sha256 for part in kept.state] != known
        for one in self._evaluations:
            if one.step >= opening.known_step_count or (is_new and kept and one.step == kept.step):
                self._tell(evaluation=one)
        if is_new:
            self._tell(checkpoint=kept)

    async def close(self) -> None:
        """Nobody goes on with it."""
        self._arrivals.close()
        with suppress(Unavailable):  # a worker that died has forgotten it
            async for _ in self._worker.call(messages.CloseTraining(self._name)):
                pass

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        async for request in requests:
            match request.WhichOneof("payload"):
                case "chunk":
                    await self._arrivals.take(request.chunk)
                case "batch":
                    self._count(request.batch)
                    self._asked.put_nowait(request)
                case "evaluate":
                    self._count_in()
                    _check_count(request.evaluate.samples, "evaluate.samples")
                    self._asked.put_nowait(request)
                case "checkpoint":
                    self._count_in()
                    self._asked.put_nowait(request)
                case "end":
                    self.is_ended = True
                    self.client_is_gone.set()
                    return
                case other:
                    raise refusal(other or "nothing in one")
        self._asked.put_nowait(None)

    def _count(self, batch: training_pb2.TrainBatch) -> None:
        self._count_in()
        if batch.step != self._next_step:
            raise InvalidRequest.given("batch.step", batch.step, f"{self._next_step}", "GRAMMAR")
        _check_count(batch.samples, "batch.samples")
        self._next_step += 1

    def _count_in(self) -> None:
        if self._opened is None:
            raise refusal("a batch or checkpoint before the training was opened")
        if self._unanswered == _BATCHES_AHEAD:
            raise refusal(f"more than {_BATCHES_AHEAD} batches and checkpoints ahead")
        self._unanswered += 1

    async def _answer(self, opening: training_pb2.OpenTraining, group: asyncio.TaskGroup) -> None:
        """What was asked, in its order. A checkpoint is of what came before it and nothing else."""
        learning: list[asyncio.Task[None]] = []
        with suppress(_ClientGone):
            await self._open(opening)
            while (request := await self._next()) is not None:
                if request.HasField("batch"):
                    samples = await self._sent(self._samples(request.batch.samples, "batch"))
                    step = messages.Learn(self._name, request.batch.step, samples, self._share)
                    learning = [
                        *(task for task in learning if not task.done()),
                        group.create_task(self._learn(step)),
                    ]
                    continue
                await asyncio.gather(*learning)
                if request.HasField("evaluate"):
                    await self._evaluate(request.evaluate)
                else:
                    await self._take_checkpoint()
                self._unanswered -= 1
        await asyncio.gather(*learning)
        if self.shall_leave.is_set():
            if self._learnt_step > self._kept_step:
                await self._take_checkpoint(leaving=True)
            elif self._checkpoint:  # which the client may be fetching
                self._checkpoint.leaving = True
                self._tell(checkpoint=self._checkpoint)
            if self._checkpoint:
                while await self._asked.get() is not None:
                    pass  # the client ends when it has fetched what is here
            raise stopping()

    async def _next(self) -> Request | None:
        """What is asked next; None when that is all, or it is time to leave."""
        leaving = asyncio.create_task(self.shall_leave.wait())
        asked = asyncio.create_task(self._sent(self._asked.get()))
        try:
            await asyncio.wait({leaving, asked}, return_when=asyncio.FIRST_COMPLETED)
            return None if leaving.done() else asked.result()
        finally:
            leaving.cancel()
            asked.cancel()

    async def _sent(self, awaited: Awaitable[T]) -> T:
        """What the client sends; raises _ClientGone when it is gone."""
        sent = asyncio.ensure_future(awaited)
        alone = asyncio.create_task(self.client_is_gone.wait())
        try:
            await asyncio.wait({sent, alone}, return_when=asyncio.FIRST_COMPLETED)
            if not sent.done():
                raise _ClientGone
            return sent.result()
        finally:
            sent.cancel()
            alone.cancel()

    async def _open(self, opening: training_pb2.OpenTraining) -> None:
        if self._opened is None:
            self._opened = await self._begun(opening)
            self._kept_step = self._next_step = self._learnt_step = self._opened.step
        self._opened.step = self._learnt_step
        self._tell(opened=self._opened)

    async def _begun(self, opening: training_pb2.OpenTraining) -> training_pb2.TrainingOpened:
        model = self._worker.loaded(messages.Model)
        plan = plans.plan(opening.plan, model.shape, "open.plan")
        beside = None
        state = [path for _, path in await self._sent(self._arrivals.files(opening.state))]
        if plan.beside:
            files = self._arrivals.files([opening.plan.beside.digest])
            [(_, beside)] = await self._sent(files)
        largest = plans.sizes(opening.largest_batch, "open.largest_batch")
        asked = messages.OpenTraining(
            self._name,
            plan,
            tuple(state),
            beside,
            largest,
            opening.low_memory,
            opening.batch_is_open and len(largest) == 1,
        )
        try:
            opened = await self._one(asked)
        except ZImageError as error:
            if error.reason != messages.TRAINING_TAKEN or not await self._make_room():
                raise
            opened = await self._one(asked)
        assert isinstance(opened, messages.TrainingOpened)
        self._plan = opened.plan
        self._about = _about(opened.plan, model)
        return training_pb2.TrainingOpened(
            plan=plans.message(opened.plan),
            step=opened.step,
            batch_size=opened.batch_size,
            parameter_count=opened.parameter_count,
            batches_ahead=_BATCHES_AHEAD,
            numeric_plan=numeric_plan(model),
        )

    async def _samples(
        self, samples: Sequence[training_pb2.TrainSample], path: str
    ) -> tuple[messages.TrainSample, ...]:
        """With their files on this machine."""
        latents = await self._arrivals.files([sample.latents for sample in samples])
        captions = await self._arrivals.files([sample.caption for sample in samples])
        weights = [sample.weight if sample.HasField("weight") else 1.0 for sample in samples]
        for index, weight in enumerate(weights):
            if not 0 < weight < float("inf"):
                field = f"{path}.samples[{index}].weight"
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
        if learnt.device_bytes is not None:
            report.device_bytes = learnt.device_bytes
        if (percent := self._battery.percent()) is not None:
            report.battery_percent = percent
        self._reports.append(report)
        self._tell(step=report)

    async def _evaluate(self, asked: training_pb2.EvaluateBatch) -> None:
        samples = await self._sent(self._samples(asked.samples, "evaluate"))
        looked = messages.Evaluate(self._name, asked.first_index, samples, self._share)
        evaluated = await self._one(looked)
        assert isinstance(evaluated, messages.Evaluated)
        report = training_pb2.EvaluationReport(
            step=evaluated.step,
            first_index=asked.first_index,
            sample_count=len(samples),
            loss=evaluated.loss,
        )
        self._evaluations = [one for one in self._evaluations if one.step == report.step]
        self._evaluations.append(report)
        self._tell(evaluation=report)

    async def _take_checkpoint(self, *, leaving: bool = False) -> None:
        with self._blobs.making() as folder:
            taken = await self._one(messages.TakeCheckpoint(self._name, folder, self._about))
            assert isinstance(taken, messages.Checkpoint)
            weights, *state = [await self._adopt(file) for file in (taken.weights, *taken.state)]
        self._checkpoint = training_pb2.CheckpointReady(
            step=taken.step,
            weights=_digest(*weights),
            state=[_digest(*part) for part in state],
            leaving=leaving,
        )
        self._kept_step = taken.step
        self._tell(checkpoint=self._checkpoint)

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
        self.told.put_nowait(Response(**event))


def _check_count(samples: Sequence[training_pb2.TrainSample], field: str) -> None:
    if not 1 <= len(samples) <= _MOST_SAMPLES:
        given = f"{len(samples)} samples"
        raise InvalidRequest.given(field, given, f"1 to {_MOST_SAMPLES}", "GRAMMAR")


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


def stopping() -> Unavailable:
    """The error of a service that ends."""
    return Unavailable("the service is being stopped", reason="STOPPING", retry_after=1.0)


def refusal(given: str) -> InvalidRequest:
    """Of what the grammar does not have."""
    allowed = "open; once it is opened, batches and checkpoints; what is needed at any time"
    return InvalidRequest.given("messages of TrainSession", given, allowed, "GRAMMAR")


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
