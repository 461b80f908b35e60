"""What steps learn from, prepared ahead in the order of the curriculum, whoever is away."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from trainer_service.caches import REPLACED
from trainer_service.desk import Desk, Listener, is_passing, pause_seconds
from zimage_client import AsyncClient, DitDescription, EncoderDescription, training
from zimage_core.errors import InvalidRequest, ZImageError
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import (
    Curriculum,
    Habits,
    Look,
    held_out,
)
from zimage_rpc.trainer.v1 import trainer_pb2

_PREPARED_AHEAD = 8
"""Steps whose samples are being prepared while others are learnt."""
_ENCODED_AT_ONCE = 16
"""Samples, where all are encoded first; how many services work on at once the caches decide."""
_LOOKED_AT_ONCE = 16
"""Samples that are not learnt."""
_FIRST = -1
"""The step before all, which what is encoded first is for."""
_MOST_FAILURES = 5
"""In a row, where all is encoded first, before another DiT service is looked for."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caching:
    """How far it is with what is encoded before the first step."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Services:
    """Those that encode for a stretch, as they were when it began."""

    client: AsyncClient
    """Of the DiT service."""
    dit: DitDescription
    encoder: EncoderDescription


class Preparing:
    """For one stretch of a job."""

    def __init__(
        self,
        desk: Desk,
        job: str,
        spec: trainer_pb2.TrainJobSpec,
        examples: tuple[Example, ...],
        listener: Listener,
    ) -> None:
        self._desk = desk
        self._job = job
        self._spec = spec
        self._listener = listener
        self.learnt, held = held_out(examples, spec.training.seed, spec.validation.share)
        self.held = [Look(one, one.caption, spec.sides_px[0], False) for one in held]
        """What is looked at and not learnt."""
        self.caching: Caching | None = None
        """Where all is encoded first."""
        self.shall_rest = asyncio.Event()
        """Whether no more batches are wanted."""
        self._is_waiting = False
        self._awaited_step = _FIRST
        self._services: Services

    def begin(self, services: Services) -> None:
        """With those that there are."""
        self._services = services

    def _curriculum(self) -> Curriculum:
        """By what is decided now."""
        return Curriculum(self.learnt, self._spec.training.seed, _habits(self._spec))

    async def check_held(self) -> None:
        """What cannot be looked at is to be known before anything is learnt."""
        if self.caching is None:  # or they are encoded already
            await self._encode(self.held)

    async def encode_all(self) -> bool:
        """Until everything that will be learnt is kept, or rest is due; whether everything is."""
        step_count = self._spec.training.step_count
        curriculum = self._curriculum()
        learnt = await self._desk.aside(lambda: list(curriculum.until(step_count)))
        looks = [*self.held, *learnt]
        self.caching = Caching(0, len(looks))
        return await self._encode(looks)

    async def _encode(self, looks: list[Look]) -> bool:
        """Whether all are kept: rest may be due before."""
        done = 0

        async def encode(look: Look) -> None:
            await self._patiently(_FIRST, lambda: self._sample(look))

        left = iter(looks)
        under_way: set[asyncio.Task[None]] = set()
        try:
            while not self.shall_rest.is_set():
                for look in islice(left, _ENCODED_AT_ONCE - len(under_way)):
                    under_way.add(asyncio.create_task(encode(look)))
                if not under_way:
                    return True
                encoded = await self._done_of(under_way)
                under_way -= encoded
                done += len(encoded)
                await self._is_back()
                if self.caching:
                    self.caching = Caching(done, len(looks))
                    self._listener.ring(self._job)
            return False
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def batches(self, first: int) -> AsyncGenerator[training.Batch, None]:
        """Those from a step on, prepared ahead, until rest is due."""
        curriculum, count = self._curriculum(), self._spec.training.step_count
        ahead: deque[asyncio.Task[training.Batch]] = deque()
        try:
            for following in range(first, count):
                while len(ahead) < min(_PREPARED_AHEAD, count - following):
                    preparing = self._prepared(curriculum, following + len(ahead))
                    ahead.append(asyncio.create_task(preparing))
                self._awaited_step = following
                if not await self._done_of({ahead[0]}):
                    return
                yield await ahead.popleft()
                await self._is_back()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def looked_at(self) -> AsyncGenerator[training.Evaluate, None]:
        """All that is not learnt, in pieces."""
        for first in range(0, len(self.held), _LOOKED_AT_ONCE):
            looks = self.held[first : first + _LOOKED_AT_ONCE]

            async def make(looks: list[Look] = looks) -> list[training.Sample]:
                return await asyncio.gather(*(self._sample(one) for one in looks))

            yield training.Evaluate(first, await self._patiently(self._awaited_step, make))

    async def _prepared(self, curriculum: Curriculum, step: int) -> training.Batch:
        async def make() -> training.Batch:
            looks = await self._desk.aside(lambda: curriculum.batch(step))
            samples = [self._sample(look) for look in looks]
            return training.Batch(step, await asyncio.gather(*samples))

        return await self._patiently(step, make)

    async def _patiently(self, step: int, make: Callable[[], Awaitable[T]]) -> T:
        """Waits for whoever is away: what was learnt since the last checkpoint stays."""
        failures = 0
        while True:
            try:
                return await make()
            except ZImageError as error:
                is_hopeless = step == _FIRST and failures == _MOST_FAILURES
                if not is_passing(error) or error.reason == REPLACED or is_hopeless:
                    raise
                if step == self._awaited_step:
                    self._is_waiting = True
                    await self._listener.waits(self._job, error)
            await asyncio.sleep(pause_seconds(failures))
            failures += 1

    async def _sample(self, look: Look) -> training.Sample:
        services = self._services
        try:
            latents, embedding = await asyncio.gather(
                self._desk.caches.latents(look, services.client, services.dit),
                self._desk.caches.caption(
                    look.caption, services.encoder, is_narrow=self._spec.narrow_captions
                ),
            )
        except InvalidRequest as error:
            said = f"{look.example.name} cannot be learnt from: {error.message}"
            raise InvalidRequest(said, reason=error.reason, fields=error.fields) from error
        return training.Sample(latents, embedding, look.example.weight)

    async def _is_back(self) -> None:
        """Whoever was waited for is there again."""
        if self._is_waiting:
            self._is_waiting = False
            await self._listener.runs(self._job)

    async def _done_of(self, tasks: set[asyncio.Task[T]]) -> set[asyncio.Task[T]]:
        """Waits until one of them is done, or rest is due; raises what broke one."""
        resting = asyncio.create_task(self.shall_rest.wait())
        try:
            await asyncio.wait({*tasks, resting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            resting.cancel()
        done = {task for task in tasks if task.done()}
        for task in done:
            task.result()
        return done


def _habits(spec: trainer_pb2.TrainJobSpec) -> Habits:
    return Habits(
        batch_size=spec.batch_size,
        sides_px=tuple(spec.sides_px),
        caption_dropout=spec.caption_dropout,
        shuffles_tags=spec.shuffle_tags,
        fixed_tag_count=spec.fixed_tag_count,
    )
