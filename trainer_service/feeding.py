"""A job's stretch on a DiT service: batches in their order, prepared ahead, and what comes of them
kept."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial

from trainer_service.caches import loading
from trainer_service.desk import (
    STORE_FULL,
    Desk,
    Listener,
    obstacle_to,
    pause_seconds,
    publish,
)
from trainer_service.foreseeing import decide, largest_batch
from trainer_service.jobs.jobs import Job, Kept
from trainer_service.keeping import (
    CHECKPOINTS,
    SAMPLES,
    checkpoint_files,
    file_name,
    forget_thinned,
)
from trainer_service.preparing import Preparing, Services
from trainer_service.sampling import Sampler
from zimage_client import AsyncClient, DitDescription, Limits, TrainStep, training
from zimage_core.digests import Named
from zimage_core.errors import NotFound, Overloaded, ZImageError
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import is_enough, size_px
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2

_log = logging.getLogger(__name__)

_MOST_DRAWING = 4
"""Checkpoints that are shown at once; where drawing is slower than learning, some are not."""
_LONGEST_DRAWING_SECONDS = 600.0
"""What the end of a training waits for the last pictures."""
_ENTERED_SECONDS = 1.0
"""Between two transactions for steps."""


class Feeding:
    """One stretch."""

    def __init__(
        self, desk: Desk, job: Job, examples: tuple[Example, ...], listener: Listener
    ) -> None:
        self._desk = desk
        self._listener = listener
        self._job = job
        self._dit = desk.dits[0]
        self._side_px = 0
        """Of pictures that are drawn with checkpoints."""
        self._spec = trainer_pb2.TrainJobSpec.FromString(job.spec)
        self.preparing = Preparing(desk, job.id, self._spec, examples, listener)
        self._lost: dict[int, training.Evaluated] = {}
        """On what is not learnt, behind the latest step that had it looked at, by the places of
        pieces."""
        self._learnt: list[TrainStep] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._drawing: list[asyncio.Task[None]] = []
        self._guidance = 0.0
        """That of pictures without wishes."""
        self._usual_share: dict[str, float] = {}
        """Of detail in pictures of few steps, by their prompts, before the training."""
        self._entered = time.monotonic()
        self._has_begun = asyncio.Event()
        self._begun_step = 0
        """Behind how many steps the service goes on."""
        self._kept_step = 0
        """Behind how many the last checkpoint was."""
        self._is_shown = asyncio.Event()
        """Whether the checkpoint before was drawn with, where the model itself is learnt."""
        self.shall_rest = self.preparing.shall_rest
        """Whether it ends behind its next checkpoint, which comes soon then."""

    async def run(self, epoch: int) -> bool:
        """From the last checkpoint until all is learnt, or rest is due; whether all is. Raises what
        broke it."""
        if self._is_learnt and not await self._lacks_pictures():
            return True
        encoder = await self._desk.client.describe_encoder()
        if not encoder.ready:
            raise loading("the encoder")
        self._dit, dit = await self._free_dit()
        self.preparing.begin(Services(self._dit, dit, encoder))
        try:
            return await self._run_there(epoch, dit)
        finally:
            self._desk.learning[self._dit] -= 1

    @property
    def _is_learnt(self) -> bool:
        kept = self._job.checkpoints
        return (bool(kept) and kept[-1].step == self._spec.training.step_count) or self._is_enough

    async def _run_there(self, epoch: int, dit: DitDescription) -> bool:
        assert dit.limits is not None
        assert dit.model is not None
        self._guidance = dit.model.default_guidance
        self._side_px, _ = size_px(1, 1, self._spec.sides_px[0], dit.limits.side_multiple_px)
        if self._is_learnt:
            await self._draw_last()
            return True
        spec = self._spec
        if spec.only_caches or spec.captions == trainer_pb2.TrainJobSpec.CAPTIONS_ALL_FIRST:
            await self._listener.runs(self._job.id)
            if not await self.preparing.encode_all():
                return False
        if spec.only_caches:
            return True
        await self.preparing.check_held()
        return await self._learn(epoch, dit.limits)

    async def _learn(self, epoch: int, limits: Limits) -> bool:
        last = await self._desk.aside(self._last_whole)
        opening = training_pb2.OpenTraining(
            job=self._job.id,
            session_epoch=epoch,
            plan=self._spec.training,
            low_memory=self._spec.low_memory,
            batch_is_open=self._spec.batch_size == 0,
        )
        if last:
            opening.state.extend(map(training.digest, last.state))
        learnt = self.preparing.learnt
        batch = await self._desk.aside(lambda: largest_batch(self._spec, learnt, limits))
        opening.largest_batch.extend(batch)
        if self._job.step:
            opening.known_step_count = self._job.step
        self._kept_step = last.step if last else 0
        asked = self._asked()
        session = self._dit.train_session(opening, asked, self._desk.blobs.local)
        try:
            async with aclosing(session) as events:
                async for event in events:
                    await self._hear(event)
                    if isinstance(event, training.Checkpoint):
                        self._kept_step = event.step
            await self._all_kept()
            if self._is_learnt or not self.shall_rest.is_set():
                await self._all_drawn()
        except ZImageError:
            with suppress(ZImageError):
                await self._all_kept()  # what was there before it broke stays
            raise
        finally:
            for task in (*self._keeping, *self._drawing):
                task.cancel()
            await asyncio.shield(self._flush())
        return self._kept_step == self._spec.training.step_count or self._is_enough

    @property
    def _is_enough(self) -> bool:
        """Whether it has got no better for too long."""
        plan = self._spec.validation
        losses = [one.validation_loss for one in self._job.checkpoints]
        return is_enough([one for one in losses if one is not None], plan.patience, plan.least_gain)

    async def _hear(self, event: training.Answer) -> None:
        match event:
            case training.Opened():
                self._desk.places[self._job.id] = self._dit
                self._begun_step = event.step
                self._has_begun.set()
                await self._decide(event)
                await self._listener.runs(self._job.id)
                if await self._lacks_pictures():
                    self._drawing.append(asyncio.create_task(self._draw_last()))
            case TrainStep():
                await self._enter(event)
                self._look_after_battery(event.battery_percent)
            case training.Evaluated():
                self._lost = {
                    first: one for first, one in self._lost.items() if one.step == event.step
                } | {event.first: event}
            case training.Checkpoint() if event.step == self._kept_step:  # it is told again
                await self._all_kept()
            case training.Checkpoint():  # kept while others are learnt, one after the other
                await self._all_kept()
                await self._flush()
                self._keeping = [asyncio.create_task(self._keep(event))]
                full, patience = self._spec.training.full, self._spec.validation.patience
                if event.leaving or full or patience:
                    await self._all_kept()
                if full:  # what is drawn with it is drawn before it changes
                    await self._all_drawn()
                self._is_shown.set()

    async def _lacks_pictures(self) -> bool:
        """Whether a break took those of the last checkpoint, and they can be drawn now."""
        if not self._job.checkpoints or not self._spec.samples.prompts or self._spec.training.full:
            return False
        last = self._job.checkpoints[-1]
        return not await self._desk.aside(lambda: self._desk.jobs.samples(self._job.id, last.step))

    async def _draw_last(self) -> None:
        """Without them it goes on, too."""
        try:
            await self._draw(self._job.checkpoints[-1])
        except Exception:  # noqa: BLE001 - whatever it is, what is learnt is worth more
            _log.exception("job %s: its last checkpoint cannot be drawn with", self._job.id)

    def _look_after_battery(self, percent: float | None) -> None:
        least = self._spec.least_battery_percent
        if percent is not None and percent < least and not self.shall_rest.is_set():
            why = f"the battery where it learns is at {percent:.0f} %, and {least} is the least"
            self._listener.rests(self._job.id, why)

    async def _all_drawn(self) -> None:
        if self._drawing:
            await asyncio.wait(self._drawing, timeout=_LONGEST_DRAWING_SECONDS)

    async def _all_kept(self) -> None:
        """Waits for the checkpoint before; raises what went wrong with it."""
        keeping, self._keeping = self._keeping, []
        await asyncio.gather(*keeping)

    def _last_whole(self) -> Kept | None:
        """The latest checkpoint whose state is there; with none of its own, what it was to go on
        from."""
        for kept in reversed(self._job.checkpoints):
            with suppress(NotFound):
                if kept.state and all(self._sized(part.sha256) for part in kept.state):
                    return kept
        if not self._spec.HasField("start"):
            return None
        start = self._spec.start
        state = tuple(self._sized(part.sha256) for part in start.state)
        return Kept(start.step, Named(start.weights.sha256, 0), state, 0.0)

    def _sized(self, sha256: str) -> Named:
        """A file of the store; raises NotFound."""
        return Named(sha256, self._desk.blobs.local(sha256).stat().st_size)

    async def _decide(self, opened: training.Opened) -> None:
        """What was left open until the service decided it stays so, whatever a later one would."""
        before = self._spec.SerializeToString(deterministic=True)
        decide(self._spec, opened.plan, opened.batch_size, self.preparing.learnt)
        spec = self._spec.SerializeToString(deterministic=True)
        if spec != before:
            await self._desk.aside(lambda: self._desk.jobs.decide(self._job.id, spec))

    async def _free_dit(self) -> tuple[AsyncClient, DitDescription]:
        """A DiT service that is there with the job's model: the first of those with the fewest
        jobs."""
        error: ZImageError = loading("the model")
        last, learning = self._desk.places.get(self._job.id), self._desk.learning
        for client in sorted(self._desk.dits, key=lambda one: (one is not last, learning[one])):
            learning[client] += 1  # others look for one at the same time
            obstacle: ZImageError | None = error
            try:
                described = await client.describe()
                obstacle = obstacle_to(self._spec, described)
                if obstacle is None:
                    return client, described
                error = obstacle
            except ZImageError as one:
                error = one
            finally:
                learning[client] -= obstacle is not None
        raise error

    async def _asked(self) -> AsyncGenerator[training.Asked, None]:
        """What is left, and checkpoints where they are due."""
        await self._has_begun.wait()
        done = self._begun_step
        if done > self._kept_step and self._is_due(done):  # the request for it got lost
            async for one in self._checkpoint():
                yield one
        async with aclosing(self.preparing.batches(done)) as batches:
            async for batch in batches:
                yield batch
                done = batch.step + 1
                if self._is_due(done) or self.shall_rest.is_set():
                    async for one in self._checkpoint():
                        yield one
                if self.shall_rest.is_set() or self._is_enough:
                    return
        if done > self._kept_step and not self._is_due(done):  # rest was due
            yield training.TakeCheckpoint()

    def _is_due(self, step: int) -> bool:
        """Whether there is a checkpoint behind so many steps."""
        is_last = step == self._spec.training.step_count
        return is_last or step % self._spec.checkpoint_interval_steps == 0

    async def _checkpoint(self) -> AsyncGenerator[training.Asked, None]:
        """One, and before it what tells how good it is. Waits for it where the next step depends on
        what is seen there."""
        self._is_shown.clear()
        async for piece in self.preparing.looked_at():
            yield piece
        yield training.TakeCheckpoint()
        if self._spec.training.full or self._spec.validation.patience:
            await self._is_shown.wait()

    async def _enter(self, learnt: TrainStep) -> None:
        self._learnt.append(learnt)
        if time.monotonic() - self._entered >= _ENTERED_SECONDS:
            await self._flush()

    async def _flush(self) -> None:
        learnt, self._learnt = self._learnt, []
        self._entered = time.monotonic()
        await self._desk.aside(lambda: self._desk.jobs.add_steps(self._job.id, learnt))
        self._listener.ring(self._job.id)

    async def _keep(self, made: training.Checkpoint) -> None:
        """Its files are here, and stay, before anybody hears of it."""
        desk, job = self._desk, self._job.id
        kept = Kept(made.step, made.weights, made.state, time.time(), self._validation(made.step))
        for name, named in checkpoint_files(job, kept):
            await self._fetch_when_there_is_room(named)
            await desk.aside(partial(desk.blobs.point, CHECKPOINTS, name, named.sha256))
        await desk.aside(lambda: self._enter_checkpoint(kept))
        self._listener.ring(job)
        self._drawing = [task for task in self._drawing if not task.done()]
        if len(self._drawing) < _MOST_DRAWING:
            self._drawing.append(asyncio.create_task(self._show(kept)))

    def _validation(self, step: int) -> float | None:
        """The mean loss of all that was looked at behind a step."""
        lost = [one for one in self._lost.values() if one.step == step]
        count = sum(one.count for one in lost)
        if count != len(self.preparing.held) or not count:
            return None
        mean = sum(one.loss * one.count for one in lost) / count
        return mean if math.isfinite(mean) else math.inf

    def _enter_checkpoint(self, kept: Kept) -> None:
        """And forgets what is not to be kept besides."""
        jobs, spec = self._desk.jobs, self._spec
        jobs.add_checkpoint(self._job.id, kept)
        self._job = jobs.thin_out(self._job.id, spec.kept_checkpoint_count, spec.kept_state_count)
        forget_thinned(self._desk.blobs, self._job)

    async def _show(self, kept: Kept) -> None:
        """Lets people draw with a checkpoint, and draws what was asked for, while others are
        learnt; without that it goes on, too."""
        try:
            if not self._spec.training.full:
                await publish(self._desk, self._spec.name, kept)
            if self._spec.samples.prompts:
                await self._draw(kept)
        except Exception:  # noqa: BLE001 - whatever it is, what is learnt is worth more
            _log.exception("job %s: step %s cannot be shown", self._job.id, kept.step)

    async def _draw(self, kept: Kept) -> None:
        desk, job = self._desk, self._job.id
        sampler = Sampler(
            self._spec.samples,
            self._side_px,
            self._guidance,
            desk.blobs,
            desk.client,
            self._usual_share,
        )
        adapter = None if self._spec.training.full else kept.weights
        drawn = await sampler.draw(self._dit, adapter)
        for number, one in enumerate(drawn):
            name = file_name(job, kept.step, number)
            await desk.aside(partial(desk.blobs.point, SAMPLES, name, one.picture.sha256))
        await desk.aside(lambda: desk.jobs.add_samples(job, kept.step, drawn))
        self._listener.ring(job)

    async def _fetch_when_there_is_room(self, named: Named) -> None:
        """What was learnt for it stays there meanwhile."""
        failures = 0
        while True:
            try:
                await self._fetch(named)
                break
            except Overloaded as error:
                if error.reason != STORE_FULL:
                    raise
                await self._listener.waits(self._job.id, error)
            await asyncio.sleep(pause_seconds(failures))
            failures += 1
        if failures:
            await self._listener.runs(self._job.id)

    async def _fetch(self, named: Named) -> None:
        blobs = self._desk.blobs
        found = await self._desk.aside(lambda: blobs.find(named.sha256))
        if found.complete:
            return
        with blobs.making() as folder:
            file = folder / named.sha256
            await self._dit.get_blob(named.sha256, file)
            await self._desk.aside(lambda: blobs.adopt(file))
