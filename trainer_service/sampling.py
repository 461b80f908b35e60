"""Pictures of how far a training is, drawn with its checkpoints the way everybody draws."""

import asyncio
import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Unpack

from trainer_service.jobs.jobs import Sampled
from zimage_client import AsyncClient, Options
from zimage_core.digests import Named
from zimage_core.errors import ZImageError
from zimage_core.pictures import files
from zimage_core.store.blobs import Blobs
from zimage_rpc.trainer.v1 import trainer_pb2

_LEAST_DETAIL = 1e-3
"""Of a picture of one colour."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws for one job."""

    plan: trainer_pb2.SamplePlan
    side_px: int
    usual_guidance: float
    blobs: Blobs
    encoder: AsyncClient
    usual_share: dict[str, float]
    """Of detail in pictures of few steps, against many, of the model without what is learnt; found
    out once."""

    async def draw(self, dit: AsyncClient, adapter: Named | None) -> list[Sampled]:
        """A picture of each prompt, with an adapter or with the service's model as it is; the same
        prompt is drawn from the same noise each time."""
        found, options = [], self._options()
        if adapter:
            file = await asyncio.to_thread(self.blobs.local, adapter.sha256)
            options["adapters"] = {file: 1.0}
        if options.get("guidance", self.usual_guidance):
            options["negative"] = await self.encoder.encode("")
        for prompt in self.plan.prompts:
            data = await self._picture(dit, prompt, **options)
            sha256 = hashlib.sha256(data).hexdigest()
            await asyncio.to_thread(self.blobs.keep, sha256, data)
            found.append(Sampled(prompt, Named(sha256, len(data))))
        if self.plan.many_step_count:
            with suppress(ZImageError):  # pictures are worth more than what is told of them
                found[0] = replace(found[0], lost_detail=await self._lost_detail(dit, options))
        return found

    async def _lost_detail(self, dit: AsyncClient, options: Options) -> float:
        """Of the first prompt: a model that forgets its few steps draws blurred pictures in them,
        and sharp ones in many."""
        prompt = self.plan.prompts[0]
        if prompt not in self.usual_share:
            plain = Options(**{**options, "adapters": {}})
            self.usual_share[prompt] = await self._share(dit, prompt, plain)
        return 1 - await self._share(dit, prompt, options) / self.usual_share[prompt]

    async def _share(self, dit: AsyncClient, prompt: str, options: Options) -> float:
        """How much detail pictures of few steps have of that of many."""
        many = Options(**{**options, "steps": self.plan.many_step_count})
        few_detail, many_detail = [
            await asyncio.to_thread(files.detail, await self._picture(dit, prompt, **one), prompt)
            for one in (options, many)
        ]
        return max(few_detail, _LEAST_DETAIL) / max(many_detail, _LEAST_DETAIL)

    async def _picture(self, dit: AsyncClient, prompt: str, **options: Unpack[Options]) -> bytes:
        embedding = await self.encoder.encode(prompt, packing="solo")
        made = await dit.generate(embedding, **options)
        return made.pictures[0].data

    def _options(self) -> Options:
        plan = self.plan
        options = Options(
            seed=plan.seed,
            width=self.side_px,
            height=self.side_px,
            priority="background",
        )
        if plan.HasField("step_count"):
            options["steps"] = plan.step_count
        if plan.HasField("guidance_scale"):
            options["guidance"] = plan.guidance_scale
        return options
