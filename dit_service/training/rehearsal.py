"""How long a step of a training will last, tried on one block before anything is learnt."""

import time
from dataclasses import dataclass
from math import isqrt
from typing import cast

import torch

from dit_service.model.adapters import NOTHING
from dit_service.model.blocks import Block, run_block
from dit_service.model.layout import SampleShape
from dit_service.model.transformer import ZImageTransformer
from zimage_core.planning.flops import DitShape, dit_block_flops, dit_step_flops
from zimage_core.planning.training import TrainingPlan
from zimage_core.planning.training_memory import LEAST_FORWARDS, Rows, forwards

_MOST_IMAGE, _MOST_CAPTION = 4096, 512
"""Rows that are tried, of all samples together; what more of them take is arithmetic."""
_ROUNDS, _LONG_SECONDS = 6, 2.0
"""The first of them choose kernels and take memory; two are enough where they last."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """So many such samples at once, or less of them where that is much."""

    sample: Rows
    at_once: int

    @property
    def tried(self) -> Rows:
        """Of each sample."""
        return Rows(min(self.sample.image, _MOST_IMAGE), min(self.sample.caption, _MOST_CAPTION))

    @property
    def count(self) -> int:
        """Of samples that are tried."""
        most = min(_MOST_IMAGE // self.tried.image, _MOST_CAPTION // self.tried.caption)
        return max(1, min(self.at_once, most))

    def flops(self, shape: DitShape) -> float:
        """The arithmetic of trying."""
        return float(_ROUNDS * LEAST_FORWARDS * self.count * self._of_block(shape))

    def seconds_per_sample(
        self, model: ZImageTransformer, backend: str, plan: TrainingPlan
    ) -> float:
        """Of a step of such a plan, by a block whose rows need a gradient and whose weights need
        none, whatever is learnt: that is most of it."""
        forward, backward = self._tried_out(model, backend)
        again = forwards(plan) - LEAST_FORWARDS
        of_block = (1 + again + plan.full) * forward + backward
        flops = dit_step_flops(model.config, [(self.sample.image, self.sample.caption)])
        return of_block / self.count * flops / self._of_block(model.config)

    def _of_block(self, shape: DitShape) -> int:
        return dit_block_flops(shape, self.tried.image + self.tried.caption)

    def _tried_out(self, model: ZImageTransformer, backend: str) -> tuple[float, float]:
        """The seconds of a block, and of its gradient, when it was the fastest."""
        config, tried = model.config, self.tried
        side = min(isqrt(tried.image), *config.axes_lens[1:])
        shapes = [SampleShape(side, side, tried.caption)] * self.count
        segments = model.layout(shapes).joint
        block = cast("Block", model.layers[0])
        x_TD = torch.randn(
            sum(segments.lengths), config.dim, device=model.device, dtype=model.dtype
        ).requires_grad_()
        took: list[tuple[float, float]] = []
        while len(took) < _ROUNDS and (len(took) < 2 or sum(map(sum, took)) < _LONG_SECONDS):
            began = _now(model.device)
            with torch.enable_grad():
                out_TD = run_block(block, x_TD, block.norm_weights(), segments, backend, NOTHING)
            between = _now(model.device)
            torch.autograd.grad(out_TD, x_TD, torch.ones_like(out_TD))
            took.append((between - began, _now(model.device) - between))
        return min(took, key=sum)


def _now(device: torch.device) -> float:
    """When all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
