"""The decoder once more: it learns to draw sharply from latents as the transformer makes them.

The encoder rests, so the cached latents and the transformer stay what they are.
"""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from demo_model import captions
from demo_model.captions import TRAINING
from demo_model.recipe import canvases
from demo_model.recipe import tokenizer as tokens
from demo_model.recipe.autoencoder import drawn_losses, noise_like
from demo_model.recipe.optimiser import Muon
from demo_model.recipe.stages import warm_up_and_down

STEPS = 1400
_AT_ONCE = 8
_RATE = 7e-4
_DECAY = 0.6
_MOST_NOISE = 0.5
_PREDICTED = 0.5
"""The share of batches whose latents are the transformer's predictions from a noisy start."""
_SIGMAS = (0.1, 0.6)


class DecoderTraining:
    """As the autoencoder's, from latents that are slightly wrong."""

    def __init__(
        self, autoencoder: Any, networks: nn.ModuleDict, tokenizer: Any, device: torch.device
    ) -> None:
        self._device = device
        self._networks = networks.requires_grad_(False)
        self._tokenizer = tokenizer
        self.model = autoencoder
        autoencoder.encoder.requires_grad_(False)
        self._optimiser = Muon(autoencoder.decoder.named_parameters(), _RATE, _is_matrix)

    def step(self, number: int, progress: float, chance: random.Random) -> Mapping[str, float]:
        """One batch."""
        batch = canvases.scenes(_AT_ONCE, chance)
        pictures = batch.pictures.to(self._device, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16):
            latents = self.model.encode(pictures).latent_dist.mean.float()
            if chance.random() < _PREDICTED:
                latents = self._predicted(latents, batch, chance)
            else:
                latents = latents + noise_like(latents, _MOST_NOISE)
        with torch.autocast(self._device.type, torch.bfloat16):
            drawn = self.model.decoder(latents)
        told = drawn_losses(drawn.float(), pictures, batch.weights.to(self._device))
        sum(told.values(), torch.zeros((), device=self._device)).backward()
        self._optimiser.step(warm_up_and_down(progress, number, _DECAY))
        return {name: value.item() for name, value in told.items()}

    def _predicted(self, latents: Tensor, batch: canvases.Batch, chance: random.Random) -> Tensor:
        """What the transformer takes the latents for after noise went over them."""
        texts = [captions.caption(scene, TRAINING, chance) for scene in batch.scenes]
        ids, is_text = tokens.padded(tokens.encode(self._tokenizer, texts))
        sigmas = torch.empty(len(latents), device=self._device).uniform_(*_SIGMAS)
        share = sigmas.view(-1, 1, 1, 1)
        noised = (1 - share) * latents + share * torch.randn_like(latents)
        features = self._networks["text"](ids.to(self._device))
        predicted = self._networks["transformer"](
            noised, 1 - sigmas, features, is_text.to(self._device)
        )
        velocity: Tensor = predicted.velocity
        return noised + share * velocity

    def state(self) -> dict[str, Any]:
        """All that changes."""
        return {"model": self.model.state_dict(), "optimiser": self._optimiser.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up where the state was made."""
        self.model.load_state_dict(state["model"])
        self._optimiser.load(state["optimiser"])


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name not in ("conv_in.weight", "conv_out.weight")
