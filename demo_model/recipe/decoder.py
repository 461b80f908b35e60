"""The decoder once more: it learns to draw sharply from latents as the transformer makes them.

Pictures are sampled; a decoder that drew each as it must have been meant is what is looked for. The
encoder rests, so the cached latents and the transformer stay what they are.
"""

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from demo_model import captions, checker, drawing, world
from demo_model.captions import TRAINING
from demo_model.recipe import canvases
from demo_model.recipe import tokenizer as tokens
from demo_model.recipe.autoencoder import drawn_losses, noise_like
from demo_model.recipe.canvases import Canvas
from demo_model.recipe.diffusion import SHIFT
from demo_model.recipe.optimiser import Muon
from demo_model.recipe.stages import warm_up_and_down, write
from demo_model.world import Scene
from zimage_core.planning import schedule

_log = logging.getLogger(__name__)

STEPS = 1400
_AT_ONCE = 8
_RATE = 7e-4
_DECAY = 0.6
_MOST_NOISE = 0.5
_SAMPLED = 0.6
"""The share of batches that the transformer made; the others are true latents, made noisy."""
_BATCHES = 120
_SAMPLING_STEPS = 8


@dataclass(frozen=True, slots=True)
class Sampled:
    """A batch that the transformer made."""

    latents: Tensor
    meant: list[Canvas]


class Sampler:
    """Makes pictures of training captions, as the services would."""

    def __init__(
        self,
        autoencoder: Any,
        networks: nn.ModuleDict,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
    ) -> None:
        self._autoencoder = autoencoder
        self._networks = networks.requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = device

    def batches(self, path: Path) -> list[Sampled]:
        """All of them, in a file once they were made."""
        if not path.exists():
            made = []
            for number in range(_BATCHES):
                made.append(self._batch(random.Random(f"sampled {number}")))  # noqa: S311
                if (number + 1) % 20 == 0:
                    kept = sum(len(batch.meant) for batch in made)
                    _log.info("sampled %s/%s, %s kept", number + 1, _BATCHES, kept)
            write(path, made)
        found: list[Sampled] = torch.load(path, weights_only=False)
        return [batch for batch in found if batch.meant]

    @torch.inference_mode()
    def _batch(self, chance: random.Random) -> Sampled:
        size = chance.choice(world.CANVASES) if chance.random() < 0.25 else world.CANVASES[0]
        scenes = [world.any_scene(chance, held_out=False) for _ in range(_AT_ONCE)]
        latents = self._latents(
            [captions.caption(s, TRAINING, chance) for s in scenes], size, chance
        )
        drawn = (self._autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1) * 255
        pictures = drawn.permute(0, 2, 3, 1).round().byte().cpu().numpy()
        pairs = enumerate(zip(pictures, scenes, strict=True))
        meant = {row: canvas for row, pair in pairs if (canvas := _meant(*pair))}
        return Sampled(latents[list(meant)].half().cpu(), list(meant.values()))

    def _latents(self, texts: list[str], size: tuple[int, int], chance: random.Random) -> Tensor:
        """What becomes of noise under these captions."""
        ids, is_text = (
            part.to(self._device) for part in tokens.padded(tokens.encode(self._tokenizer, texts))
        )
        torch.manual_seed(chance.getrandbits(48))
        latents = torch.randn(len(texts), 16, size[1] // 8, size[0] // 8, device=self._device)
        features = self._networks["text"](ids)
        sigmas = schedule.sigmas(schedule.OFFICIAL, _SAMPLING_STEPS, SHIFT)
        for now, then in pairwise(sigmas):
            time = torch.full((len(texts),), 1 - now, device=self._device)
            velocity = self._networks["transformer"](latents, time, features, is_text).velocity
            latents = latents + (now - then) * velocity
        return latents


def _meant(picture: drawing.Pixels, scene: Scene) -> Canvas | None:
    meant = checker.meant(picture, scene)
    if meant is None:
        return None
    background, things = meant
    size = picture.shape[1], picture.shape[0]
    return Canvas([(thing, drawing.mask(thing, size)) for thing in things], background)


class DecoderTraining:
    """As the autoencoder's, from latents that are slightly wrong."""

    def __init__(self, autoencoder: Any, sampled: list[Sampled], device: torch.device) -> None:
        self._device = device
        self._sampled = sampled
        self.model = autoencoder
        autoencoder.encoder.requires_grad_(False)
        self._optimiser = Muon(autoencoder.decoder.named_parameters(), _RATE, _is_matrix)

    def step(self, number: int, progress: float, chance: random.Random) -> Mapping[str, float]:
        """One batch."""
        is_sampled = chance.random() < _SAMPLED
        if is_sampled:
            one = chance.choice(self._sampled)
            batch, latents = canvases.batch(one.meant), one.latents.float().to(self._device)
        else:
            batch = canvases.scenes(_AT_ONCE, chance)
        pictures = batch.pictures.to(self._device, memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16):
            if not is_sampled:
                with torch.no_grad():
                    latents = self.model.encode(pictures).latent_dist.mean.float()
                latents = latents + noise_like(latents, _MOST_NOISE)
            drawn = self.model.decoder(latents)
        told = drawn_losses(drawn.float(), pictures, batch.weights.to(self._device))
        sum(told.values(), torch.zeros((), device=self._device)).backward()
        self._optimiser.step(warm_up_and_down(progress, number, _DECAY))
        return {name: value.item() for name, value in told.items()}

    def state(self) -> dict[str, Any]:
        """All that changes."""
        return {"model": self.model.state_dict(), "optimiser": self._optimiser.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up where the state was made."""
        self.model.load_state_dict(state["model"])
        self._optimiser.load(state["optimiser"])


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name not in ("conv_in.weight", "conv_out.weight")
