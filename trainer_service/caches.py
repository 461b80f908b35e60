"""What was encoded once: captions and pictures as files in the store, under keys of everything that
decides what is in them."""

import asyncio
import hashlib
import json
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from typing import TypeVar

from zimage_client import AsyncClient, DitDescription, EncoderDescription
from zimage_core.digests import Named
from zimage_core.embeddings import TRUNCATE, Prompt
from zimage_core.errors import InvalidRequest, NotFound, Unavailable, ZImageError
from zimage_core.formats import eight_bits
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.embedding import EmbeddingFile
from zimage_core.pictures import files
from zimage_core.planning.curriculum import Look, size_px
from zimage_core.store.blobs import Blobs
from zimage_core.tensors import TensorData

CAPTIONS, LATENTS = "captions", "latents"
"""The kinds of names that they have in the store."""

CAPTION_TOKENS = 512
"""What is longer is cut there, as where the model was trained."""

_AT_ONCE = {CAPTIONS: 4, LATENTS: 2}
"""What is made of each kind: people ask the same services for pictures meanwhile."""

REPLACED = "REPLACED"
"""The reason of the error when a service is another by now: who asks must look again."""

_PILLOW = metadata.version("pillow")

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

    async def caption(
        self, text: str, encoder: EncoderDescription, *, is_narrow: bool = False
    ) -> Named:
        """The file of a caption's embedding, in eight bits a number if wanted. Encoded alone: in
        company its last bits would depend on whose."""
        if encoder.model is None:
            raise loading("the encoder")
        model = encoder.model
        limit = min(CAPTION_TOKENS, model.recipe.token_limit)
        prompt = Prompt(text, token_limit=limit, long_prompt_mode=TRUNCATE)
        recipe = replace(model.recipe, token_limit=limit, long_prompt_mode=TRUNCATE)
        key: dict[str, object] = {
            "text": text,
            "identity": model.identity,
            "recipe": asdict(recipe),
            "numerics": asdict(model.numerics),
        }
        if is_narrow:
            key["form"] = "e4m3 by rows"

        async def make() -> bytes:
            embedding = await self._client.encode(prompt, packing="solo", timeout=None)
            said = embedding.identity, embedding.recipe, embedding.numerics
            if said != (model.identity, recipe, model.numerics):
                raise Unavailable("the encoder was replaced by another one", reason=REPLACED)
            if is_narrow:
                return await self._aside(lambda: eight_bits.file(embedding.tensor))
            return embedding_file.dump(EmbeddingFile(embedding))

        return await self._kept(CAPTIONS, key, make)

    async def latents(self, look: Look, client: AsyncClient, dit: DitDescription) -> Named:
        """The file of a picture's latents, cut to its size, with its mask where it has one. They
        are of the VAE of that DiT service."""
        if dit.limits is None:
            raise loading("the model")
        example, multiple = look.example, dit.limits.side_multiple_px
        size = size_px(example.width_px, example.height_px, look.side_px, multiple)
        vae = _vae(dit)
        key = {
            "picture": example.sha256,
            "mask": example.mask_sha256,
            "size": size,
            "is_flipped": look.is_flipped,
            "pillow": _PILLOW,
            "vae": vae,
        }

        async def make() -> bytes:
            data = await self._aside(
                lambda: files.cut(
                    self._read(example.sha256), example.name, size, flips=look.is_flipped
                )
            )
            [(_, latents)] = [one async for one in client.encode_images([data])]
            if isinstance(latents, ZImageError):
                raise latents
            if _vae(await client.describe()) != vae:
                raise Unavailable("the DiT service has another VAE by now", reason=REPLACED)
            tensors = {"latents": latents}
            if example.mask_sha256:
                tensors["mask"] = await self._aside(lambda: self._mask(look, size, latents.shape))
            return _file(tensors)

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

    def _mask(self, look: Look, size: tuple[int, int], latents_shape: Sequence[int]) -> TensorData:
        """The weights of the latents' places, 0 to 1."""
        _, height, width = latents_shape
        example = look.example
        data = self._read(example.mask_sha256)
        levels = files.cut_mask(data, example.name, size, (width, height), flips=look.is_flipped)
        if not any(levels):
            raise InvalidRequest(
                f"the mask of {example.name} marks nothing of what is left when it is cut",
                reason="DATASET",
                fields={"field": "spec.dataset", "given": example.name},
            )
        weights = struct.pack(f"<{len(levels)}f", *(level / 255 for level in levels))
        return TensorData("float32", (height, width), weights)

    def _read(self, sha256: str) -> bytes:
        with self._blobs.open(sha256) as file:
            return file.read()

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _vae(dit: DitDescription) -> dict[str, object]:
    """All that decides what a picture's latents are."""
    if dit.model is None or dit.numeric_plan is None:
        raise loading("the model")
    plan = dit.numeric_plan
    return {
        "weights": dit.model.vae_sha256,
        "device": plan.device,
        "type": plan.vae_compute_type,
        "tile": plan.vae_tile_px,
        "libraries": dict(plan.library_versions),
    }


def _file(tensors: Mapping[str, TensorData]) -> bytes:
    """A safetensors file."""
    described, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.element_type == "float32"
        begin, end = end, end + len(tensor.data)
        shape = list(tensor.shape)
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"".join(t.data for t in tensors.values())


def loading(what: str) -> Unavailable:
    """The error of a service that is not ready yet."""
    return Unavailable(f"{what} is being loaded", reason="LOADING", retry_after=1.0)
