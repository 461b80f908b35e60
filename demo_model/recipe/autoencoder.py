"""The autoencoder: pictures to latents that show the shape, survive noise, and come back sharp."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from demo_model import world
from demo_model.recipe import canvases
from demo_model.recipe.optimiser import Muon
from demo_model.recipe.stages import warm_up_and_down

CHANNELS = 16
STEPS = 6400
_CLOSEUPS, _WHOLE = 0.5, 0.8
"""Until then canvases of 64 pixels; until then encoder and decoder together, later the decoder."""
_CLOSEUPS_AT_ONCE, _SCENES_AT_ONCE = 16, 6
_RATE = 1.5e-3
_DECAY = 0.4
_MOST_NOISE = 0.5
_PROBE_WEIGHT = 0.1
_EMPTY_WEIGHT = 0.3
_FROZEN_LOG_VARIANCE = -6.0


def new_autoencoder() -> Any:
    """Untrained, of the demo model's shape."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=world.CANVASES[0][0],
        scaling_factor=1.0,
        shift_factor=0.0,
    ).to(memory_format=torch.channels_last)


class Normaliser(nn.Module):
    """Brings each latent channel to unit variance by its running statistics. Those of the batch
    would tie a picture's colours to its neighbours'."""

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("variance", torch.ones(CHANNELS))
        self.register_buffer("seen", torch.zeros(()))

    def learn(self, latents_BCHW: Tensor) -> None:
        """Enters a batch."""
        with torch.no_grad():
            share = max(0.03, 1 / (float(self.seen) + 1))
            self.seen += 1
            mean, variance = latents_BCHW.mean((0, 2, 3)), latents_BCHW.var((0, 2, 3))
            self.variance.lerp_(variance + (mean - self.mean).square() * (1 - share), share)
            self.mean.lerp_(mean, share)

    @property
    def deviation(self) -> Tensor:
        """By which latents are divided."""
        return (self.variance + 1e-4).sqrt()

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        """The latents as the transformer will see them."""
        return (latents_BCHW - self.mean.view(-1, 1, 1)) / self.deviation.view(-1, 1, 1)


class AutoencoderTraining:
    """Close-ups first, then whole scenes, then the decoder alone."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self._device = device
        self.model = new_autoencoder().to(device)
        self.normaliser = Normaliser().to(device)
        self.probe = nn.Conv2d(CHANNELS, len(world.SHAPES) + 1, 1).to(device)
        into = [
            *self.model.encoder.named_parameters(prefix="encoder"),
            *self.probe.named_parameters(prefix="probe"),
        ]
        # Two, because Muon moves by the direction alone: without a gradient it would still move.
        self._into = Muon(into, _RATE, _is_matrix)
        self._out_of = Muon(
            self.model.decoder.named_parameters(prefix="decoder"), _RATE, _is_matrix
        )
        weights = torch.ones(len(world.SHAPES) + 1, device=device)
        weights[canvases.NOTHING] = _EMPTY_WEIGHT
        self._label_weights = weights

    def step(self, number: int, progress: float, chance: random.Random) -> Mapping[str, float]:
        """One batch."""
        if progress < _CLOSEUPS:
            batch = canvases.closeups(_CLOSEUPS_AT_ONCE, chance)
        else:
            batch = canvases.scenes(_SCENES_AT_ONCE, chance)
        pictures = batch.pictures.to(self._device, memory_format=torch.channels_last)
        trains_encoder = progress < _WHOLE
        with torch.autocast(self._device.type, torch.bfloat16):
            with torch.set_grad_enabled(trains_encoder):
                encoded = self.model.encoder(pictures)[:, :CHANNELS].float()
                if trains_encoder:
                    self.normaliser.learn(encoded.detach())
                latents = self.normaliser(encoded)
            noised = latents + noise_like(latents, _MOST_NOISE)
            drawn = self.model.decoder(noised)
        told = drawn_losses(drawn.float(), pictures, batch.weights.to(self._device))
        if trains_encoder:
            told["probe"] = _PROBE_WEIGHT * functional.cross_entropy(
                self.probe(noised).float(),
                batch.labels.to(self._device),
                self._label_weights,
                ignore_index=canvases.UNKNOWN,
            )
        loss = sum(told.values(), torch.zeros((), device=self._device))
        loss.backward()
        scale = warm_up_and_down(progress, number, _DECAY)
        self._out_of.step(scale)
        if trains_encoder:
            self._into.step(scale)
        return {name: value.item() for name, value in told.items()}

    def state(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "model": self.model.state_dict(),
            "normaliser": self.normaliser.state_dict(),
            "probe": self.probe.state_dict(),
            "into": self._into.state(),
            "out_of": self._out_of.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up where the state was made."""
        self.model.load_state_dict(state["model"])
        self.normaliser.load_state_dict(state["normaliser"])
        self.probe.load_state_dict(state["probe"])
        self._into.load(state["into"])
        self._out_of.load(state["out_of"])

    def save(self, folder: Path) -> None:
        """The autoencoder as diffusers reads it, its normaliser folded in."""
        last = self.model.encoder.conv_out
        with torch.no_grad():
            deviation = self.normaliser.deviation
            last.weight[:CHANNELS] /= deviation.view(-1, 1, 1, 1)
            last.bias[:CHANNELS] = (last.bias[:CHANNELS] - self.normaliser.mean) / deviation
            last.weight[CHANNELS:] = 0
            last.bias[CHANNELS:] = _FROZEN_LOG_VARIANCE
        self.model.save_pretrained(folder)


def drawn_losses(drawn: Tensor, pictures: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """How far a drawing is from its picture: in level, in slope, and where it is far."""
    error = drawn - pictures
    across = (error[..., 1:] - error[..., :-1]).abs() * weights[..., 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weights[..., 1:, :]
    return {
        "level": (error.abs() * weights).mean(),
        "slope": 0.5 * (across.mean() + down.mean()),
        "square": 0.5 * (error.square() * weights).mean(),
    }


def noise_like(latents_BCHW: Tensor, most: float) -> Tensor:
    """Noise of every strength up to `most`, often little; for some of the pictures in coarse
    grains, as a model's errors are."""
    count, channels, height, width = latents_BCHW.shape
    device = latents_BCHW.device
    strength = torch.rand(count, 1, 1, 1, device=device) * most
    strength = torch.where(
        torch.rand(count, 1, 1, 1, device=device) < 0.4, strength * 0.25, strength
    )
    coarse = functional.interpolate(
        torch.randn(count, channels, height // 2, width // 2, device=device), size=(height, width)
    )
    is_coarse = torch.rand(count, 1, 1, 1, device=device) < 0.3
    return strength * torch.where(is_coarse, coarse, torch.randn_like(latents_BCHW))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    is_edge = name.startswith(("probe.", "decoder.conv_out")) or "conv_in" in name
    return parameter.ndim >= 2 and not is_edge
