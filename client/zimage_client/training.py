"""A training session on a DiT service: steps to learn go out, what came of them comes back."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from zimage_client import _jobs, _reading
from zimage_client._calls import TypedErrors
from zimage_client._channel import Metadata
from zimage_client._events import NumericPlan
from zimage_client._jobs import TrainStep
from zimage_core.digests import Named
from zimage_core.errors import Cancelled
from zimage_core.files import chunks
from zimage_core.wire.limits import CHUNK_BYTES
from zimage_rpc.dit.v1 import dit_pb2, training_pb2, training_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

_ENDING_SECONDS, _SENDING_SECONDS = 1.0, 0.05
_WRITTEN_AHEAD = 4
"""Messages that wait for the connection: the rest of a file waits on disk."""

_Request = training_pb2.TrainSessionRequest
_Response = training_pb2.TrainSessionResponse


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture and its caption, as the files that hold latents and embedding."""

    latents: Named
    caption: Named
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step is learnt from."""

    step: int
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """What is looked at and not learnt, with what was learnt from the batches before."""

    first: int
    """The place of the first among all that are looked at."""
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class TakeCheckpoint:
    """What is there behind the batches before."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What will really be trained."""

    plan: training_pb2.TrainingPlan
    step: int
    """How many are behind it."""
    parameter_count: int
    batch_size: int
    """What all devices compute at once."""
    numeric_plan: NumericPlan


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is there behind so many steps, in the service's store."""

    step: int
    weights: Named
    state: tuple[Named, ...]
    leaving: bool = False
    """Whether the service is about to stop, and waits until whoever hears of it asks for more."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What was lost on samples that are not learnt."""

    step: int
    """How many are behind it."""
    first: int
    count: int
    loss: float
    """Their mean."""


Asked = Batch | Evaluate | TakeCheckpoint
Answer = Opened | TrainStep | Evaluated | Checkpoint


class Session:
    """A stretch of a training: from its opening until all that was asked is answered."""

    def __init__(
        self,
        opening: training_pb2.OpenTraining,
        asked: AsyncGenerator[Asked, None],
        file: Callable[[str], Path],
    ) -> None:
        """`asked` is read as the service gets on; `file` says where what was named lies."""
        self._opening = opening
        self._asked = asked
        self._file = file
        self._outbox: asyncio.Queue[_Request | None] = asyncio.Queue(_WRITTEN_AHEAD)
        self._credit = _Credit()
        self._has_ended = asyncio.Event()
        self._aside: list[asyncio.Task[None]] = []

    async def answers(
        self, channel: grpc.aio.Channel, metadata: Metadata
    ) -> AsyncGenerator[Answer, None]:
        """What the service says; leaving it early ends the session."""
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        call = stub.TrainSession(self._messages(), metadata=metadata)
        told: asyncio.Queue[_Response | None] = asyncio.Queue()
        reading = asyncio.create_task(self._read(call, told))
        try:
            while (response := await told.get()) is not None:
                if (answer := self._heard(response, call)) is not None:
                    yield answer
                if response.checkpoint.leaving:  # whoever heard of it has what he wants by now
                    await self._outbox.put(None)
            await reading  # raises what ended it
        except asyncio.CancelledError:
            await self._say_the_end()
            raise
        except Cancelled:
            for task in self._aside:
                if task.done() and not task.cancelled() and (fault := task.exception()):
                    raise fault from None  # it was ours, and ended the call
            raise
        finally:
            for task in (*self._aside, reading):
                task.cancel()
            await asyncio.gather(*self._aside, reading, return_exceptions=True)
            await self._asked.aclose()
            call.cancel()  # without effect on a call that has ended
            del call

    async def _read(self, call: Any, told: "asyncio.Queue[_Response | None]") -> None:
        """In a task of its own: who is cancelled while it waits for a call cancels that, too."""
        try:
            with TypedErrors(call):
                async for response in call:
                    told.put_nowait(response)
        finally:
            told.put_nowait(None)

    async def _say_the_end(self) -> None:
        """So that the service does not wait for another call."""
        while not self._outbox.empty():
            self._outbox.get_nowait()
        self._outbox.put_nowait(_Request(end=training_pb2.EndTraining()))
        self._outbox.put_nowait(None)
        with suppress(TimeoutError):
            async with asyncio.timeout(_ENDING_SECONDS):
                await self._has_ended.wait()
                await asyncio.sleep(_SENDING_SECONDS)

    def _heard(self, response: _Response, call: Any) -> Answer | None:
        match response.WhichOneof("event"):
            case "opened":
                self._credit.give(response.opened.batches_ahead)
                self._begin(self._feed(), call)
                return _opened(response.opened)
            case "need":
                self._begin(self._send(response.need.digests), call)
                return None
            case "step":
                self._credit.give_back()
                return _jobs.step(response.step)
            case "evaluation":
                self._credit.give_back()
                said = response.evaluation
                return Evaluated(said.step, said.first_index, said.sample_count, said.loss)
            case "checkpoint":
                if not response.checkpoint.leaving:
                    self._credit.give_back()
                return _checkpoint(response.checkpoint)
            case other:
                raise _reading.malformed(f"{other or 'nothing'} in a training session")

    async def _messages(self) -> AsyncIterator[_Request]:
        yield _Request(open=self._opening)
        while (message := await self._outbox.get()) is not None:
            yield message
        self._has_ended.set()

    async def _feed(self) -> None:
        async for one in self._asked:
            await self._credit.take()
            await self._outbox.put(_message(one))
        await self._credit.all_back()
        await self._outbox.put(None)

    async def _send(self, digests: Sequence[types_pb2.Digest]) -> None:
        for digest in digests:
            file = await asyncio.to_thread(self._file, digest.sha256)
            pieces = iter(chunks(file, 0, CHUNK_BYTES))
            while data := await asyncio.to_thread(next, pieces, b""):
                chunk = dit_pb2.BlobChunk(sha256=digest.sha256, data=data)
                await self._outbox.put(_Request(chunk=chunk))

    def _begin(self, work: Coroutine[Any, Any, None], call: Any) -> None:
        """Beside the others; what breaks it ends the call."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception():
                call.cancel()

        self._aside.append(asyncio.create_task(work))
        self._aside[-1].add_done_callback(ended)


class _Credit:
    """How much may be asked ahead of its answers."""

    def __init__(self) -> None:
        self._all = self._left = 0
        self._changed = asyncio.Event()

    def give(self, count: int) -> None:
        """At the beginning."""
        self._all = self._left = count

    def give_back(self) -> None:
        """Something was answered."""
        self._left += 1
        self._changed.set()

    async def take(self) -> None:
        """Waits for some."""
        await self._until(1)
        self._left -= 1

    async def all_back(self) -> None:
        """Waits until everything is answered."""
        await self._until(self._all)

    async def _until(self, wanted: int) -> None:
        while self._left < wanted:
            self._changed.clear()
            await self._changed.wait()


def _message(asked: Asked) -> _Request:
    match asked:
        case TakeCheckpoint():
            return _Request(checkpoint=training_pb2.TakeCheckpoint())
        case Evaluate():
            samples = map(_sample, asked.samples)
            evaluate = training_pb2.EvaluateBatch(first_index=asked.first, samples=samples)
            return _Request(evaluate=evaluate)
        case Batch():
            samples = map(_sample, asked.samples)
            return _Request(batch=training_pb2.TrainBatch(step=asked.step, samples=samples))


def _sample(sample: Sample) -> training_pb2.TrainSample:
    return training_pb2.TrainSample(
        latents=digest(sample.latents), caption=digest(sample.caption), weight=sample.weight
    )


def digest(named: Named) -> types_pb2.Digest:
    """Its message."""
    return types_pb2.Digest(sha256=named.sha256, size_bytes=named.size_bytes)


def _opened(message: training_pb2.TrainingOpened) -> Opened:
    return Opened(
        plan=message.plan,
        step=message.step,
        parameter_count=message.parameter_count,
        batch_size=message.batch_size,
        numeric_plan=_reading.numeric_plan(message.numeric_plan),
    )


def _checkpoint(message: training_pb2.CheckpointReady) -> Checkpoint:
    return Checkpoint(
        message.step,
        _named(message.weights),
        tuple(map(_named, message.state)),
        message.leaving,
    )


def _named(message: types_pb2.Digest) -> Named:
    return Named(message.sha256, message.size_bytes)
