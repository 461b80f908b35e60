"""Pictures to latents and back: streams whose items succeed or fail each for itself."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from dit_service import messages
from dit_service.rpc.spec import Resolver, check_side, decide_format
from zimage_core.errors import InvalidRequest, Unavailable, ZImageError
from zimage_core.pictures import files
from zimage_core.serving.worker import Worker
from zimage_core.settings import DitSettings
from zimage_core.tensors import TensorData
from zimage_core.wire import status, tensors
from zimage_core.wire.limits import ENVELOPE_BYTES, MESSAGE_BYTES
from zimage_rpc.dit.v1 import dit_pb2

T = TypeVar("T")


class Conversions:
    """Answers one item after the other; the worker does the VAE's part."""

    def __init__(self, worker: Worker, settings: DitSettings) -> None:
        self._worker = worker
        self._settings = settings

    async def encode(self, item: dit_pb2.EncodeImagesRequest) -> dit_pb2.EncodeImagesResponse:
        """A picture's latents, or why there are none."""
        answer = dit_pb2.EncodeImagesResponse(item_id=item.item_id)
        with _failing_alone(answer):
            answer.latents.CopyFrom(tensors.to_wire(await self._latents(item.image)))
        return answer

    async def decode(self, item: dit_pb2.DecodeLatentsRequest) -> dit_pb2.DecodeLatentsResponse:
        """The picture of some latents, or why there is none."""
        answer = dit_pb2.DecodeLatentsResponse(item_id=item.item_id)
        with _failing_alone(answer):
            answer.image.CopyFrom(await self._image(item))
        return answer

    async def _latents(self, file: bytes) -> TensorData:
        limits = Resolver(self._worker.loaded(messages.Model), self._settings).limits
        size, rgb = await asyncio.to_thread(
            files.decode_for_model, file, "image", limits.max_side_px
        )
        for name, side in zip(("width", "height"), size, strict=True):
            check_side(f"image.{name}", side, limits)
        return await self._only(messages.EncodeImage(*size, rgb), TensorData)

    async def _image(self, item: dit_pb2.DecodeLatentsRequest) -> dit_pb2.DecodedImage:
        model = self._worker.loaded(messages.Model)
        output = dit_pb2.Output(format=item.format)
        if item.HasField("quality"):
            output.quality = item.quality
        file_format = decide_format(output, "")
        latents = tensors.from_wire(item.latents, field="latents")
        size = _size(latents, model, Resolver(model, self._settings).limits)
        picture = await self._only(messages.DecodeLatents(latents), messages.Picture)
        return await asyncio.to_thread(_decoded, picture.rgb, size, file_format, output.quality)

    async def _only(self, asked: object, kind: type[T]) -> T:
        [event] = [event async for event in self._worker.call(asked)]
        assert isinstance(event, kind)
        return event


@contextmanager
def _failing_alone(
    answer: dit_pb2.EncodeImagesResponse | dit_pb2.DecodeLatentsResponse,
) -> Iterator[None]:
    """An error of the item is its answer; one of the service is not the item's fault, and leaves
    the block: the whole stream is sent again."""
    try:
        yield
    except Unavailable:
        raise
    except ZImageError as error:
        answer.failure.CopyFrom(status.to_failure(error))


def _decoded(
    rgb: bytes, size: tuple[int, int], file_format: str, quality: int
) -> dit_pb2.DecodedImage:
    file = files.encode(rgb, size, file_format, quality)
    if len(file) + ENVELOPE_BYTES > MESSAGE_BYTES:
        raise InvalidRequest(
            f"latents: their picture is a {file_format} file of {len(file)} bytes, {MESSAGE_BYTES} "
            "fit into an answer; ask for JPEG or WebP",
            reason="REPLY_TOO_LARGE",
            fields={"field": "format", "given": str(len(file)), "allowed": str(MESSAGE_BYTES)},
        )
    return dit_pb2.DecodedImage(
        data=file,
        media_type=files.MEDIA_TYPES[file_format],
        width_px=size[0],
        height_px=size[1],
        pixels_sha256=hashlib.sha256(rgb).hexdigest(),
    )


def _size(latents: TensorData, model: messages.Model, limits: dit_pb2.Limits) -> tuple[int, int]:
    """Width and height of their picture; raises InvalidRequest for what no picture has."""
    longest = limits.max_side_px // model.pixels_per_latent
    shape = latents.shape
    is_right = len(shape) == 3 and shape[0] == model.latent_channels
    if not is_right or not all(1 <= side <= longest for side in shape[1:]):
        allowed = f"[{model.latent_channels}, 1 to {longest}, 1 to {longest}]"
        raise InvalidRequest.given("latents.shape", list(shape), allowed, "LATENTS_SHAPE")
    return shape[2] * model.pixels_per_latent, shape[1] * model.pixels_per_latent
