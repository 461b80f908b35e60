"""A request on its way: conditioning, the worker, pictures as files, the final account."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from google.protobuf.duration_pb2 import Duration

from dit_service import messages
from dit_service.rpc import describe
from dit_service.rpc.adapters import Adapters
from dit_service.rpc.conditioning import Conditioner, Side
from dit_service.rpc.costs import Costs
from dit_service.rpc.pin import CheckedEmbedding
from dit_service.rpc.spec import Resolved
from dit_service.rpc.uploads import Uploads
from zimage_core import tracing
from zimage_core.embeddings import Prompt
from zimage_core.errors import InvalidRequest
from zimage_core.pictures import files
from zimage_core.planning.shares import Share
from zimage_core.serving import access, metrics
from zimage_core.serving.admission import Cost, Place
from zimage_core.serving.worker import Worker
from zimage_core.wire import embeddings, names, receipts
from zimage_core.wire.limits import CHUNK_BYTES
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_PROVENANCE_BYTES = 4096
"""More than a receipt grows by what is not known at the beginning."""

_MOST_UNREAD = 16
"""No preview is passed on to a client that has so many answers to read."""

_Answers = AsyncGenerator[dit_pb2.GenerateResponse, None]


class Request:
    """Knows what was asked for and keeps the account of what was done."""

    def __init__(
        self,
        resolved: Resolved,
        conditioner: Conditioner,
        adapters: Adapters,
        model: messages.Model,
        costs: Costs,
    ) -> None:
        self._arrived = time.monotonic()
        self._resolved = resolved
        self._spec = spec = resolved.spec
        self._conditioner = conditioner
        self._adapters = adapters
        self._model = model
        self._sides = [conditioner.read(spec.positive, "spec.positive", model)]
        if resolved.is_guided:
            if not spec.HasField("negative"):
                empty = embeddings.prompt_to_wire(self._sides[0].empty)
                spec.negative.segments.add().prompt.CopyFrom(empty)
            self._sides.append(conditioner.read(spec.negative, "spec.negative", model))
        _tell_effective(spec, self._sides)
        self._costs = costs
        self._span = tracing.current.get()
        self._stage_began = self._arrived
        self._work_began: float | None = None
        self._steps_told, self._step_told_at = 0, self._arrived
        priority = names.name_of(spec.priority, names.PRIORITIES)
        self._share = Share(access.project(), priority)
        self._completed = dit_pb2.Completed()
        self._told: asyncio.Queue[dit_pb2.GenerateResponse | None] = asyncio.Queue()
        self._numbers = itertools.count(1)
        self._refuse_long_receipt()

    @property
    def cost(self) -> Cost:
        """What it is expected to take."""
        return self._costs.of(self._resolved, self._sides, self._model, self._share)

    async def answers(self, worker: Worker, place: Place, uploads: Uploads) -> _Answers:
        """Every answer, in the order of the grammar. The work waits for no reader, and gives its
        place up when it is done: a slow reader keeps nobody out."""
        self._tell(self._accepted(place))
        making = asyncio.create_task(self._make(worker, place, uploads))
        making.add_done_callback(lambda _making: self._told.put_nowait(None))
        try:
            while (answer := await self._told.get()) is not None:
                yield answer
            await making  # raises what ended it
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)

    async def _make(self, worker: Worker, place: Place, uploads: Uploads) -> None:
        try:
            sent = await uploads.gather(self._named(), self._tell_need)
            if any(isinstance(side.content, Prompt) for side in self._sides):
                self._tell(_progress(place, dit_pb2.Progress.STAGE_ENCODING))
            checked = await self._conditioner.resolve(
                self._sides, self._model, sent, is_solo=self._is_solo
            )
            adapters = await self._adapters.fetched(self._spec.adapters)
            self._enter_provenance(checked)
            self._completed.usage.encode_time.CopyFrom(self._since_arrival())
            self._stage_began = time.monotonic()
            self._tell(_progress(place, dit_pb2.Progress.STAGE_QUEUED))
            async with aclosing(worker.call(self._work(checked, adapters))) as events:
                async for event in events:
                    await self._retell(event, place)
        except asyncio.CancelledError:
            access.charge(self._seconds_until_now(place))
            raise
        finally:
            place.leave()
        self._tell(dit_pb2.GenerateResponse(completed=self._completed))
        _count(self._completed)

    def _seconds_until_now(self, place: Place) -> float:
        """What it was expected to take so far. Where nobody knows that, since its work began."""
        if place.cost.seconds is not None:
            return place.cost.seconds * (1 - place.left_to_do)
        return time.monotonic() - self._work_began if self._work_began else 0.0

    def _named(self) -> list[types_pb2.Digest]:
        """What the spec only names."""
        given = [side.content for side in self._sides if not isinstance(side.content, Prompt)]
        return [checked.digest for checked in given if checked.is_hollow]

    @property
    def _is_solo(self) -> bool:
        return self._spec.packing == types_pb2.PACKING_SOLO

    def _tell_need(self, digests: Iterable[types_pb2.Digest]) -> None:
        self._tell(dit_pb2.GenerateResponse(need=dit_pb2.Need(digests=digests)))

    def _tell(self, answer: dit_pb2.GenerateResponse) -> None:
        answer.sequence = next(self._numbers)
        answer.event_time.GetCurrentTime()
        self._told.put_nowait(answer)

    def _accepted(self, place: Place) -> dit_pb2.GenerateResponse:
        return dit_pb2.GenerateResponse(
            accepted=dit_pb2.Accepted(
                spec=self._spec,
                sigmas=self._resolved.sigmas,
                forward_count=self._resolved.forward_count,
                queue_position=place.calls_before,
                expected_time=_expected(place),
            )
        )

    def _work(
        self,
        checked: Sequence[CheckedEmbedding],
        adapters: tuple[messages.AdapterUse, ...],
    ) -> messages.Generate:
        positive, *negative = (side.embedding.tensor for side in checked)
        spec = self._spec
        return messages.Generate(
            positive=positive,
            negative=negative[0] if negative else None,
            seeds=self._resolved.seeds,
            width_px=spec.width_px,
            height_px=spec.height_px,
            sigmas=self._resolved.sigmas,
            guidance=spec.guidance_scale,
            cfg_normalization=spec.z_image.cfg_normalization,
            cfg_truncation=spec.z_image.cfg_truncation,
            is_solo=self._is_solo,
            share=self._share,
            previews=_previews(spec),
            adapters=adapters,
        )

    async def _retell(self, event: object, place: Place) -> None:
        """Tells the client what it hears of an event of the worker."""
        usage, step_count = self._completed.usage, len(self._resolved.sigmas) - 1
        if not usage.HasField("queue_time"):
            usage.queue_time.CopyFrom(self._since_arrival())
            self._work_began = time.monotonic()
            self._stage_ended("queue")
        match event:
            case messages.Denoised(index, step):
                stage = dit_pb2.Progress.STAGE_DENOISING
                self._steps_ended(index, step)
                self._work_done(place, index, step)
                self._tell(_progress(place, stage, index, step, step_count))
            case messages.Decoding(index):
                stage = dit_pb2.Progress.STAGE_DECODING
                self._steps_ended(index, step_count)
                self._stage_ended("denoise", steps=step_count, image_index=index)
                self._work_done(place, index, step_count)
                self._tell(_progress(place, stage, index, step_count, step_count))
            case messages.Preview() if self._told.qsize() < _MOST_UNREAD:
                preview = await asyncio.to_thread(_preview, event)
                self._tell(dit_pb2.GenerateResponse(preview=preview))
            case messages.Picture(index, rgb):
                self._stage_ended("decode", image_index=index)
                for chunk in await asyncio.to_thread(self._artifact, index, rgb):
                    self._tell(dit_pb2.GenerateResponse(artifact_chunk=chunk))
            case messages.Spent() as spent:
                access.charge(spent.denoise_seconds + spent.decode_seconds)
                self._costs.learn(self._resolved, self._sides, self._model, spent)
                usage.forward_count = spent.forward_count
                usage.denoise_time.CopyFrom(_duration(spent.denoise_seconds))
                usage.decode_time.CopyFrom(_duration(spent.decode_seconds))
                usage.mean_occupancy = spent.occupancy / spent.step_count
                metrics.DIT_STEP_SECONDS.observe(spent.denoise_seconds / spent.step_count)
                metrics.DIT_STEP_REQUESTS.observe(usage.mean_occupancy)

    def _stage_ended(self, name: str, **attributes: int) -> None:
        """For the trace: from the end of the stage before until now."""
        if self._span:
            self._span.part(name, self._stage_began, **attributes)
        self._stage_began = time.monotonic()

    def _steps_ended(self, index: int, step: int) -> None:
        """For the trace: those since the last of which the worker told."""
        if self._span and step > self._steps_told:
            first = self._steps_told + 1
            self._span.part("steps", self._step_told_at, image_index=index, first=first, last=step)
        self._steps_told, self._step_told_at = step, time.monotonic()

    def _work_done(self, place: Place, index: int, step: int) -> None:
        """The VAE's part counts as one more step."""
        steps = len(self._resolved.sigmas)
        place.done((index * steps + step) / (steps * len(self._resolved.seeds)))

    def _artifact(self, index: int, rgb: bytes) -> list[dit_pb2.ArtifactChunk]:
        """The picture as a file, entered into the account and cut into chunks."""
        spec, file_format = self._spec, self._resolved.file_format
        size = spec.width_px, spec.height_px
        pixels_sha256 = hashlib.sha256(rgb).hexdigest()
        receipt = self._receipt(index, pixels_sha256)
        file = files.encode(rgb, size, file_format, spec.output.quality, receipt)
        artifact = self._completed.artifacts.add(
            digest=types_pb2.Digest(
                sha256=hashlib.sha256(file).hexdigest(),
                size_bytes=len(file),
                media_type=files.MEDIA_TYPES[file_format],
            ),
            seed=self._resolved.seeds[index],
            pixels_sha256=pixels_sha256,
        )
        self._completed.usage.pixel_count += spec.width_px * spec.height_px
        self._completed.usage.artifact_bytes += len(file)
        chunks = [
            dit_pb2.ArtifactChunk(
                image_index=index, offset=offset, data=file[offset : offset + CHUNK_BYTES]
            )
            for offset in range(0, len(file), CHUNK_BYTES)
        ]
        chunks[-1].artifact.CopyFrom(artifact)
        return chunks

    def _receipt(self, index: int, pixels_sha256: str) -> str:
        """What the file of a picture says of how it was made."""
        if self._spec.output.metadata == dit_pb2.Output.METADATA_NONE:
            return ""
        account = self._completed
        receipt = dit_pb2.Receipt(
            format=receipts.FORMAT,
            pixels_sha256=pixels_sha256,
            spec=self._spec,
            positive=account.positive,
            negative=account.negative if account.HasField("negative") else None,
            numeric_plan=account.numeric_plan,
            model_name=self._model.name,
            version=describe.VERSION,
        )
        receipt.spec.seed = self._resolved.seeds[index]
        receipt.spec.image_count = 1
        for name in ("previews", "priority"):  # they change no pixel
            receipt.spec.ClearField(name)
        return receipts.to_text(receipt)

    def _refuse_long_receipt(self) -> None:
        """Before the work: some formats have little room beside the pixels."""
        file_format = self._resolved.file_format
        size = len(self._receipt(0, "")) + _PROVENANCE_BYTES
        longest = files.LONGEST_TEXT[file_format]
        if size > longest:
            raise InvalidRequest(
                f"spec.output.metadata: a receipt of {size} bytes does not fit into a "
                f"{file_format} file, {longest} do; ask for PNG, or for no metadata",
                reason="RECEIPT_SIZE",
                fields={
                    "field": "spec.output.metadata",
                    "given": str(size),
                    "allowed": str(longest),
                },
            )

    def _enter_provenance(self, checked: Sequence[CheckedEmbedding]) -> None:
        positive, *negative = (side.provenance() for side in checked)
        self._completed.positive.CopyFrom(positive)
        if negative:
            self._completed.negative.CopyFrom(negative[0])
        self._completed.numeric_plan.CopyFrom(describe.numeric_plan(self._model))
        self._completed.numeric_plan.packing = self._spec.packing

    def _since_arrival(self) -> Duration:
        return _duration(time.monotonic() - self._arrived)


def _count(completed: dit_pb2.Completed) -> None:
    usage, stages = completed.usage, metrics.DIT_STAGE_SECONDS
    for stage, took in (
        ("encode", usage.encode_time),
        ("queue", usage.queue_time),
        ("denoise", usage.denoise_time),
        ("decode", usage.decode_time),
    ):
        stages.labels(stage).observe(took.ToNanoseconds() / 1e9)
    metrics.DIT_FORWARDS.inc(usage.forward_count)
    metrics.DIT_PICTURES.inc(len(completed.artifacts))
    metrics.DIT_PIXELS.inc(usage.pixel_count)


def _tell_effective(spec: dit_pb2.GenerateSpec, sides: Sequence[Side]) -> None:
    """Accepted tells every layer and mode, and embeddings by their digests."""
    for conditioning, side in zip((spec.positive, spec.negative), sides, strict=False):
        if isinstance(side.content, Prompt):
            prompt = conditioning.segments[0].prompt
            prompt.CopyFrom(embeddings.prompt_to_wire(side.content.decided()))
        else:
            conditioning.segments[0].embedding_digest.CopyFrom(side.content.digest)


def _previews(spec: dit_pb2.GenerateSpec) -> messages.Previews | None:
    if not spec.HasField("previews"):
        return None
    use_vae = spec.previews.source == dit_pb2.Previews.SOURCE_VAE
    return messages.Previews(spec.previews.interval_steps, use_vae)


def _preview(drawn: messages.Preview) -> dit_pb2.Preview:
    (width, height), file = files.encode_preview(drawn.rgb, (drawn.width_px, drawn.height_px))
    return dit_pb2.Preview(
        image_index=drawn.image_index, step=drawn.step, width_px=width, height_px=height, data=file
    )


def _progress(
    place: Place,
    stage: dit_pb2.Progress.Stage.ValueType,
    image_index: int = 0,
    step: int = 0,
    step_count: int = 0,
) -> dit_pb2.GenerateResponse:
    return dit_pb2.GenerateResponse(
        progress=dit_pb2.Progress(
            stage=stage,
            image_index=image_index,
            step=step,
            step_count=step_count,
            queue_position=place.calls_before,
            expected_time=_expected(place),
        )
    )


def _expected(place: Place) -> Duration | None:
    seconds = place.expected_seconds
    return None if seconds is None else _duration(seconds)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
