"""Where encoder, DiT, VAE and trainer best go among the services that are there: by seconds that
were measured and bytes that have to travel."""

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from zimage_client._client import AsyncClient
from zimage_core.errors import Unavailable, ZImageError
from zimage_core.planning.training_memory import LEAST_FORWARDS

SAMPLE_SECONDS = 60.0
_SAMPLE_BYTES = (1 << 20, 16 << 20)
_LONG_ENOUGH_SECONDS = 0.5
"""A sample that takes so long needs no larger one after it."""
_PROMPT = "a lighthouse on a cliff at dusk, waves below, and number {} painted on its door"
_PROMPTS = 3
_STEPS = 2
_LEARNING_FORWARDS = LEAST_FORWARDS + 1
"""What a training step costs where blocks are computed again."""
_LATENTS_SHARE = 16 * 4 / 64
"""Bytes of latents, float32, of 16 channels for 8 by 8 pixels, for each pixel."""
_LITTLE = 0.1
"""Of a training step that may pass while its sample travels."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a link, in bytes a second."""

    there: float
    back: float


@dataclass(frozen=True, slots=True)
class EncoderHere:
    """What an encoder service does."""

    address: str
    device: str
    prompt_seconds: float
    """The way to it included."""
    embedding_bytes: int


@dataclass(frozen=True, slots=True)
class DitHere:
    """What a DiT service does, for a picture of its usual size."""

    address: str
    device: str
    side_px: int
    forward_seconds: float
    decode_seconds: float
    encode_seconds: float
    """Of a picture by its VAE, the way included."""
    picture_bytes: int
    speed: Speed


async def speed(client: AsyncClient) -> Speed:
    """How fast files go to the DiT service and back. What is sent stays there as a blob, until the
    service sweeps what nobody uses."""
    with TemporaryDirectory(prefix="zimage-") as folder:
        there, back = Path(folder, "there"), Path(folder, "back")
        for size in _SAMPLE_BYTES:
            await asyncio.to_thread(there.write_bytes, os.urandom(size))
            began = time.monotonic()
            sha256 = await client.put_blob(there, timeout=SAMPLE_SECONDS)
            sent = time.monotonic()
            await client.get_blob(sha256, back, timeout=SAMPLE_SECONDS)
            ended = time.monotonic()
            if ended - began > _LONG_ENOUGH_SECONDS:
                break
        return Speed(size / (sent - began), size / (ended - sent))


async def encoder_here(client: AsyncClient, address: str) -> EncoderHere:
    """Encodes some prompts that nobody had before."""
    took, size = [], 0
    for number in range(_PROMPTS):
        began = time.monotonic()
        text = _PROMPT.format(f"{time.time_ns() + number}")
        embedding = await client.encode(text, packing="solo", retry=False)
        took.append(time.monotonic() - began)
        size = len(embedding.tensor.data)
    return EncoderHere(address, str(embedding.numerics), statistics.median(took), size)


async def dit_here(client: AsyncClient, address: str) -> DitHere:
    """Draws a picture of few steps twice, the first for warmth, and encodes it."""
    found = await client.describe()
    if found.model is None or found.numeric_plan is None:
        raise Unavailable(f"{address} is loading its model", reason="LOADING")
    side = found.model.default_side_px
    for _ in range(2):
        made = await client.generate(
            _PROMPT.format(0), width=side, height=side, steps=_STEPS, guidance=0.0, retry=False
        )
    picture, usage = made.pictures[0].data, made.completed.usage
    began = time.monotonic()
    [(_, latents)] = [one async for one in client.encode_images([picture])]
    if isinstance(latents, ZImageError):
        raise latents
    return DitHere(
        address=address,
        device=f"{found.numeric_plan.device}, {found.numeric_plan.compute_type}",
        side_px=side,
        forward_seconds=usage.denoise_seconds / _STEPS,
        decode_seconds=usage.decode_seconds,
        encode_seconds=time.monotonic() - began,
        picture_bytes=len(picture),
        speed=await speed(client),
    )


def advice(encoders: Sequence[EncoderHere], dits: Sequence[DitHere]) -> Iterator[tuple[str, str]]:
    """What best goes where, and why."""
    dit = min(dits, key=lambda one: one.forward_seconds, default=None)
    if dit:
        yield (
            "DiT",
            f"{dit.address}: {dit.forward_seconds:.3f} s a forward, the least of {len(dits)}",
        )
        yield "VAE", _vae(dit)
    encoder = min(encoders, key=lambda one: _prompt_seconds(one, dit), default=None)
    if encoder:
        yield "encoder", _encoder(encoder, dit)
    if dit and encoder:
        yield "trainer", _trainer(encoder, dit)


def _prompt_seconds(encoder: EncoderHere, dit: DitHere | None) -> float:
    """Until its embedding is at the DiT service."""
    way = encoder.embedding_bytes / dit.speed.there if dit else 0.0
    return encoder.prompt_seconds + way


def _encoder(encoder: EncoderHere, dit: DitHere | None) -> str:
    said = f"{encoder.address}: {encoder.prompt_seconds:.2f} s a prompt"
    if dit is None:
        return said
    way = encoder.embedding_bytes / dit.speed.there
    return (
        f"{said}, and {encoder.embedding_bytes / 1e6:.2f} MB to {dit.address} in {way:.2f} s; a "
        f"picture of eight steps takes {8 * dit.forward_seconds + dit.decode_seconds:.1f} s there"
    )


def _vae(dit: DitHere) -> str:
    latents = dit.side_px**2 * _LATENTS_SHARE
    return (
        f"with the DiT: {dit.decode_seconds:.2f} s to decode and {dit.encode_seconds:.2f} s to "
        f"encode; elsewhere {latents / 1e6:.2f} MB of latents would travel as well, in "
        f"{latents / dit.speed.back:.2f} s"
    )


def _trainer(encoder: EncoderHere, dit: DitHere) -> str:
    size = dit.side_px**2 * _LATENTS_SHARE + encoder.embedding_bytes
    way, step = size / dit.speed.there, _LEARNING_FORWARDS * dit.forward_seconds
    is_near = way < _LITTLE * step
    where = (
        "may be here"
        if is_near
        else f"best goes to the machine of {dit.address}, one store with it"
    )
    return (
        f"{where}: a sample that is new to the DiT service is {size / 1e6:.2f} MB, {way:.2f} s "
        f"from here, and a training step with one takes about {step:.2f} s"
    )
