"""What was encoded once: captions and pictures as files in the store, under keys of everything that
decides what is in them."""

import asyncio
import hashlib
import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

from zimage_client import AsyncClient, DitDescription, EncoderDescription
from zimage_core.digests import Named
from zimage_core.errors import NotFound, Unavailable, ZImageError
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.dataset_file import Example
from zimage_core.formats.embedding import EmbeddingFile
from zimage_core.pictures import files
from zimage_core.store.blobs import Blobs
from zimage_core.tensors import TensorData

CAPTIONS, LATENTS = "captions", "latents"
"""The kinds of names that they have in the store."""

_AT_ONCE = {CAPTIONS: 4, LATENTS: 2}
"""What is made of each kind: people ask the same services for pictures meanwhile."""

T = TypeVar("T")


class Caches:
    """Those of one store, made by the services that are there now. Whoever wants the same as
    somebody else at once waits for the same."""

    def __init__(self, blobs: Blobs, client: AsyncClient, threads: ThreadPoolExecutor) -> None:
        self._blobs = blobs
        self._client = client
        self._threads = threads
        self._making: dict[str, asyncio.Task[Named]] = {}
        self._turns = {kind: asyncio.Semaphore(count) for kind, count in _AT_ONCE.items()}

    async def caption(self, text: str, encoder: EncoderDescription) -> Named:
        """The file of a caption's embedding. Encoded alone: in company its last bits would depend
        on whose."""
        if encoder.model is None:
            raise _loading("the encoder")
        model = encoder.model
        key = {
            "text": text,
            "identity": model.identity,
            "recipe": asdict(model.recipe),
            "numerics": asdict(model.numerics),
        }

        async def make() -> bytes:
            embedding = await self._client.encode(text, timeout=None)
            said = embedding.identity, embedding.recipe, embedding.numerics
            if said != (model.identity, model.recipe, model.numerics):
                raise Unavailable(
                    "the encoder was replaced by another one", reason="ENCODER_REPLACED"
                )
            return embedding_file.dump(EmbeddingFile(embedding))

        return await self._kept(CAPTIONS, key, make)

    async def latents(
        self, example: Example, size_px: tuple[int, int], dit: DitDescription
    ) -> Named:
        """The file of a picture's latents, cut to a size."""
        if dit.model is None or dit.numeric_plan is None:
            raise _loading("the model")
        plan = dit.numeric_plan
        key = {
            "picture": example.sha256,
            "size": size_px,
            "vae": dit.model.vae_sha256,
            "device": plan.device,
            "type": plan.vae_compute_type,
            "tile": plan.vae_tile_px,
            "libraries": dict(plan.library_versions),
        }

        async def make() -> bytes:
            data = await self._aside(lambda: self._cut(example, size_px))
            [(_, latents)] = [one async for one in self._client.encode_images([data])]
            if isinstance(latents, ZImageError):
                raise latents
            return _file(latents)

        return await self._kept(LATENTS, key, make)

    async def _kept(
        self, kind: str, key: Mapping[str, object], make: Callable[[], Awaitable[bytes]]
    ) -> Named:
        text = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        if name not in self._making:
            self._making[name] = asyncio.create_task(self._find_or_make(kind, name, make))
            self._making[name].add_done_callback(lambda _done: self._making.pop(name, None))
        return await asyncio.shield(self._making[name])

    async def _find_or_make(
        self, kind: str, name: str, make: Callable[[], Awaitable[bytes]]
    ) -> Named:
        try:
            return await self._aside(lambda: self._find(kind, name))
        except NotFound:
            async with self._turns[kind]:
                data = await make()
            return await self._aside(lambda: self._keep(kind, name, data))

    def _find(self, kind: str, name: str) -> Named:
        """Verified: what is torn counts as not there."""
        sha256 = self._blobs.pointed_at(kind, name)
        return Named(sha256, self._blobs.local(sha256).stat().st_size)

    def _keep(self, kind: str, name: str, data: bytes) -> Named:
        sha256 = hashlib.sha256(data).hexdigest()
        self._blobs.keep(sha256, data)
        self._blobs.point(kind, name, sha256)
        return Named(sha256, len(data))

    def _cut(self, example: Example, size_px: tuple[int, int]) -> bytes:
        with self._blobs.open(example.sha256) as file:
            data = file.read()
        return files.cut(data, example.name, size_px)

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _file(latents: TensorData) -> bytes:
    """A safetensors file of the one tensor."""
    description = {
        "dtype": "F32",
        "shape": list(latents.shape),
        "data_offsets": [0, len(latents.data)],
    }
    assert latents.element_type == "float32"
    header = json.dumps({LATENTS: description}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + latents.data


def _loading(what: str) -> Unavailable:
    return Unavailable(f"{what} is being loaded", reason="LOADING", retry_after=1.0)
