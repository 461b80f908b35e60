"""A request on its way: conditioning, the worker, pictures as files, the final account."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from google.protobuf.duration_pb2 import Duration

from dit_service import messages
from dit_service.rpc import describe
from dit_service.rpc.conditioning import Conditioner, Conditioning, digest_of
from dit_service.rpc.spec import Resolved
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.pictures import files
from zimage_core.serving.worker import Worker
from zimage_core.wire.limits import CHUNK_BYTES
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_Answers = AsyncGenerator[dit_pb2.GenerateResponse, None]


class Request:
    """Knows what was asked for and keeps the account of what was done."""

    def __init__(self, resolved: Resolved, conditioner: Conditioner) -> None:
        self._arrived = time.monotonic()
        self._resolved = resolved
        self._spec = spec = resolved.spec
        self._conditioner = conditioner
        self._given = [conditioner.read(spec.positive, "spec.positive")]
        if resolved.is_guided:
            if not spec.HasField("negative"):
                spec.negative.segments.add().prompt.text = ""
            self._given.append(conditioner.read(spec.negative, "spec.negative"))
        conditioner.refuse_prompts(self._given)
        _replace_embeddings(spec, self._given)
        self._completed = dit_pb2.Completed()

    async def events(self, worker: Worker, model: messages.Model, requests_before: int) -> _Answers:
        """Every answer, in the order of the grammar, without its number and time."""
        yield self._accepted(requests_before)
        if any(isinstance(item, Prompt) for item in self._given):
            yield _progress(dit_pb2.Progress.STAGE_ENCODING)
        conditionings = await self._conditioner.resolve(self._given, model)
        self._completed.usage.encode_time.CopyFrom(self._since_arrival())
        yield _progress(dit_pb2.Progress.STAGE_QUEUED)
        async with aclosing(worker.call(self._work(conditionings))) as events:
            async for event in events:
                async for answer in self._answers(event):
                    yield answer
        yield self._final(conditionings, model)

    def _accepted(self, requests_before: int) -> dit_pb2.GenerateResponse:
        return dit_pb2.GenerateResponse(
            accepted=dit_pb2.Accepted(
                spec=self._spec,
                sigmas=self._resolved.sigmas,
                forward_count=self._resolved.forward_count,
                queue_position=requests_before,
            )
        )

    def _work(self, conditionings: Sequence[Conditioning]) -> messages.Generate:
        positive, *negative = (conditioning.embedding.tensor for conditioning in conditionings)
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
        )

    async def _answers(self, event: object) -> _Answers:
        """What the client hears of an event of the worker."""
        usage, step_count = self._completed.usage, len(self._resolved.sigmas) - 1
        if not usage.HasField("queue_time"):
            usage.queue_time.CopyFrom(self._since_arrival())
        match event:
            case messages.Denoised(index, step):
                yield _progress(dit_pb2.Progress.STAGE_DENOISING, index, step, step_count)
            case messages.Decoding(index):
                yield _progress(dit_pb2.Progress.STAGE_DECODING, index, step_count, step_count)
            case messages.Picture(index, rgb):
                for chunk in await asyncio.to_thread(self._artifact, index, rgb):
                    yield dit_pb2.GenerateResponse(artifact_chunk=chunk)
            case messages.Spent(forward_count, denoise_seconds, decode_seconds):
                usage.forward_count = forward_count
                usage.denoise_time.CopyFrom(_duration(denoise_seconds))
                usage.decode_time.CopyFrom(_duration(decode_seconds))

    def _artifact(self, index: int, rgb: bytes) -> list[dit_pb2.ArtifactChunk]:
        """The picture as a file, entered into the account and cut into chunks."""
        spec, file_format = self._spec, self._resolved.file_format
        size = spec.width_px, spec.height_px
        file = files.encode(rgb, size, file_format, spec.output.quality)
        artifact = self._completed.artifacts.add(
            digest=types_pb2.Digest(
                sha256=hashlib.sha256(file).hexdigest(),
                size_bytes=len(file),
                media_type=files.MEDIA_TYPES[file_format],
            ),
            seed=self._resolved.seeds[index],
            pixels_sha256=hashlib.sha256(rgb).hexdigest(),
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

    def _final(
        self, conditionings: Sequence[Conditioning], model: messages.Model
    ) -> dit_pb2.GenerateResponse:
        positive, *negative = (conditioning.provenance() for conditioning in conditionings)
        self._completed.positive.CopyFrom(positive)
        if negative:
            self._completed.negative.CopyFrom(negative[0])
        self._completed.numeric_plan.CopyFrom(describe.numeric_plan(model))
        return dit_pb2.GenerateResponse(completed=self._completed)

    def _since_arrival(self) -> Duration:
        return _duration(time.monotonic() - self._arrived)


def _replace_embeddings(spec: dit_pb2.GenerateSpec, given: Sequence[Prompt | Embedding]) -> None:
    """The answer names embeddings by their digests."""
    for conditioning, item in zip((spec.positive, spec.negative), given, strict=False):
        if isinstance(item, Embedding):
            conditioning.segments[0].embedding_digest.CopyFrom(digest_of(item))


def _progress(
    stage: dit_pb2.Progress.Stage.ValueType,
    image_index: int = 0,
    step: int = 0,
    step_count: int = 0,
) -> dit_pb2.GenerateResponse:
    return dit_pb2.GenerateResponse(
        progress=dit_pb2.Progress(
            stage=stage, image_index=image_index, step=step, step_count=step_count
        )
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
