"""Pictures of how far a training is, drawn with its checkpoints the way everybody draws."""

import asyncio
import hashlib
from dataclasses import dataclass

from trainer_service.jobs.jobs import Sampled
from zimage_client import AsyncClient, Options
from zimage_core.digests import Named
from zimage_core.store.blobs import Blobs
from zimage_rpc.trainer.v1 import trainer_pb2


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws for one job."""

    plan: trainer_pb2.SamplePlan
    side_px: int
    usual_guidance: float
    blobs: Blobs
    encoder: AsyncClient

    async def draw(self, dit: AsyncClient, adapter: Named | None) -> list[Sampled]:
        """A picture of each prompt, with an adapter that lies at that service or with its model as
        it is; the same prompt is drawn from the same noise each time."""
        found = []
        options = self._options(adapter)
        if options.get("guidance", self.usual_guidance):
            options["negative"] = await self.encoder.encode("")
        for prompt in self.plan.prompts:
            embedding = await self.encoder.encode(prompt)
            made = await dit.generate(embedding, **options)
            data = made.pictures[0].data
            sha256 = hashlib.sha256(data).hexdigest()
            await asyncio.to_thread(self.blobs.keep, sha256, data)
            found.append(Sampled(prompt, Named(sha256, len(data))))
        return found

    def _options(self, adapter: Named | None) -> Options:
        plan = self.plan
        options = Options(
            seed=plan.seed,
            width=self.side_px,
            height=self.side_px,
            adapters={adapter.sha256: 1.0} if adapter else {},
            priority="background",
        )
        if plan.HasField("step_count"):
            options["steps"] = plan.step_count
        if plan.HasField("guidance_scale"):
            options["guidance"] = plan.guidance_scale
        return options
