"""A job's stretch on a DiT service: batches in their order, prepared ahead, and what comes of them
kept."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from trainer_service.caches import Caches
from trainer_service.jobs.jobs import Job, Jobs, Kept
from zimage_client import AsyncClient, DitDescription, EncoderDescription, training
from zimage_core.digests import Named
from zimage_core.errors import Unavailable
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import Curriculum, Place, size_px
from zimage_core.store.blobs import Blobs
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2
from zimage_rpc.types.v1 import types_pb2

_PREPARED_AHEAD = 8
"""Steps whose samples are being prepared while others are learnt."""
_ENTERED_SECONDS = 1.0
"""Between two transactions for steps."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Desk:
    """What all jobs of a trainer work with."""

    jobs: Jobs
    blobs: Blobs
    client: AsyncClient
    caches: Caches
    threads: ThreadPoolExecutor

    async def aside(self, work: Callable[[], T]) -> T:
        """What waits for disks."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


class Feeding:
    """One stretch."""

    def __init__(
        self, desk: Desk, job: Job, examples: tuple[Example, ...], happened: Callable[[str], None]
    ) -> None:
        """`happened` hears when there is news of the job."""
        self._desk = desk
        self._happened = happened
        self._job = job
        self._examples = examples
        self._spec = trainer_pb2.TrainJobSpec.FromString(job.spec)
        self._curriculum = Curriculum(
            seed=self._spec.training.seed,
            example_count=len(examples),
            batch_size=self._spec.batch_size,
            caption_dropout=self._spec.caption_dropout,
        )
        self._learnt: list[training.Learnt] = []
        self._entered = time.monotonic()
        self.shall_rest = asyncio.Event()
        """Whether it ends behind its next checkpoint, which comes soon then."""

    @property
    def job_id(self) -> str:
        """Whose."""
        return self._job.id

    async def run(self, epoch: int, opened: Callable[[], Awaitable[object]]) -> bool:
        """From the last checkpoint until all is learnt, or rest is due; whether all is. Raises what
        broke it."""
        last = self._job.checkpoints[-1] if self._job.checkpoints else None
        opening = training_pb2.OpenTraining(
            job=self._job.id, session_epoch=epoch, plan=self._spec.training
        )
        if last:
            opening.state.CopyFrom(_digest(last.state))
        done = last.step if last else 0
        encoder, dit = await self._neighbours()
        asked = self._asked(done, encoder, dit)
        session = self._desk.client.train_session(opening, asked, self._desk.blobs.local)
        try:
            async with aclosing(session) as events:
                async for event in events:
                    match event:
                        case training.Opened():
                            await opened()
                        case training.Learnt():
                            await self._enter(event)
                        case training.Checkpoint():
                            await self._flush()
                            await self._keep(event)
                            done = event.step
        finally:
            await asyncio.shield(self._flush())
        return done == self._spec.training.step_count

    async def _neighbours(self) -> tuple[EncoderDescription, DitDescription]:
        encoder = await self._desk.client.describe_encoder()
        dit = await self._desk.client.describe()
        for what, description in (("the encoder", encoder), ("the model", dit)):
            if not description.ready:
                raise Unavailable(f"{what} is being loaded", reason="LOADING", retry_after=1.0)
        return encoder, dit

    async def _asked(
        self, step: int, encoder: EncoderDescription, dit: DitDescription
    ) -> AsyncIterator[training.Batch | training.TakeCheckpoint]:
        """What is left, with samples prepared ahead; checkpoints where they are due."""
        count, interval = self._spec.training.step_count, self._spec.checkpoint_interval_steps
        ahead: deque[asyncio.Task[training.Batch]] = deque()
        try:
            for following in range(step, count):
                while len(ahead) < min(_PREPARED_AHEAD, count - following):
                    preparing = self._batch(following + len(ahead), encoder, dit)
                    ahead.append(asyncio.create_task(preparing))
                yield await ahead.popleft()
                is_last = following + 1 == count or self.shall_rest.is_set()
                if is_last or (following + 1) % interval == 0:
                    yield training.TakeCheckpoint()
                if is_last:
                    return
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _batch(
        self, step: int, encoder: EncoderDescription, dit: DitDescription
    ) -> training.Batch:
        places = self._curriculum.batch(step)
        samples = [self._sample(place, encoder, dit) for place in places]
        return training.Batch(step, await asyncio.gather(*samples))

    async def _sample(
        self, place: Place, encoder: EncoderDescription, dit: DitDescription
    ) -> training.Sample:
        example = self._examples[place.example]
        assert dit.limits is not None
        size = size_px(
            example.width_px, example.height_px, self._spec.side_px, dit.limits.side_multiple_px
        )
        caption = example.caption if place.has_caption else ""
        latents, embedding = await asyncio.gather(
            self._desk.caches.latents(example, size, dit),
            self._desk.caches.caption(caption, encoder),
        )
        return training.Sample(latents, embedding)

    async def _enter(self, learnt: training.Learnt) -> None:
        self._learnt.append(learnt)
        if time.monotonic() - self._entered >= _ENTERED_SECONDS:
            await self._flush()

    async def _flush(self) -> None:
        learnt, self._learnt = self._learnt, []
        self._entered = time.monotonic()
        await self._desk.aside(lambda: self._desk.jobs.add_steps(self._job.id, learnt))
        self._happened(self._job.id)

    async def _keep(self, made: training.Checkpoint) -> None:
        """Its files are here, and stay, before anybody hears of it."""
        for kind, named in (("adapter", made.adapter), ("state", made.state)):
            await self._fetch(named)
            name = f"{self._job.id}-{made.step}-{kind}"
            await self._desk.aside(
                lambda name=name, named=named: self._desk.blobs.point(  # type: ignore[misc]
                    "checkpoints", name, named.sha256
                )
            )
        kept = Kept(made.step, made.adapter, made.state, time.time())
        await self._desk.aside(lambda: self._desk.jobs.add_checkpoint(self._job.id, kept))
        self._happened(self._job.id)

    async def _fetch(self, named: Named) -> None:
        blobs = self._desk.blobs
        found = await self._desk.aside(lambda: blobs.find(named.sha256))
        if found.complete:
            return
        with blobs.making() as folder:
            file = folder / named.sha256
            await self._desk.client.get_blob(named.sha256, file)
            await self._desk.aside(lambda: blobs.adopt(file))


def _digest(named: Named) -> types_pb2.Digest:
    return types_pb2.Digest(sha256=named.sha256, size_bytes=named.size_bytes)
