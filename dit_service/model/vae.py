"""Pictures to normalised latents and back, through diffusers' AutoencoderKL.

Shapes: C latent channels of H x W; a picture is [H, W, 3] in pixels.
"""

from typing import Any

import torch
from torch import Tensor


class Vae:
    """Encodes and decodes with the constants of its own config."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        self._scaling_factor: float = model.config.scaling_factor
        self._shift_factor: float = model.config.shift_factor or 0.0
        self.latent_channels: int = model.config.latent_channels
        self.factor: int = 2 ** (len(model.config.block_out_channels) - 1)
        """Pixels per latent along a side."""
        self.sample_side_px: int = model.config.sample_size
        """The side of the pictures that it was trained on."""

    @torch.inference_mode()
    def encode(self, picture_HW3: Tensor) -> Tensor:
        """The mean latents of a uint8 RGB picture, float32 on the VAE's device."""
        unit_CHW = picture_HW3.to(self._model.device).permute(2, 0, 1).to(self._model.dtype) / 255
        mean_CHW = self._model.encode((2 * unit_CHW - 1).unsqueeze(0)).latent_dist.mean.squeeze(0)
        latents: Tensor = (mean_CHW.float() - self._shift_factor) * self._scaling_factor
        return latents

    @torch.inference_mode()
    def decode(self, latents_CHW: Tensor) -> tuple[Tensor, Tensor]:
        """The picture as uint8 RGB, rounded as diffusers' image processor does; and whether it came
        of numbers alone, on the device as well: each answer from there is waited for."""
        latents = (
            latents_CHW.to(self._model.device, self._model.dtype) / self._scaling_factor
            + self._shift_factor
        )
        image_CHW = self._model.decode(latents.unsqueeze(0), return_dict=False)[0].squeeze(0)
        unit_CHW = (image_CHW * 0.5 + 0.5).clamp(0, 1)
        picture: Tensor = (unit_CHW.permute(1, 2, 0).float() * 255).round().to(torch.uint8)
        return picture.contiguous(), image_CHW.isfinite().all()
