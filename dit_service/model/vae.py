"""Pictures to normalised latents and back, through diffusers' AutoencoderKL.

Shapes: C latent channels of H x W; a picture is [H, W, 3] in pixels.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_service.model.tiling import Tiling, tiled

_WHOLE_PX = 1536
"""Pictures of that side squared are still worked on as a whole: 3 GB in bfloat16."""
LARGE_TILE_PX, _OVERLAP_PX = 1024, 128


class Vae:
    """Encodes and decodes with the constants of its own config; large pictures in tiles."""

    def __init__(self, model: Any, tile_px: int | None = None) -> None:
        """Tiles of that side, for pictures with a longer one; None for large tiles, and for large
        pictures alone."""
        # Convolutions are faster with the channels of a pixel side by side, on CPUs and GPUs.
        model = model.to(memory_format=torch.channels_last)
        self._model = model.eval().requires_grad_(False)
        self._scaling_factor: float = model.config.scaling_factor
        self._shift_factor: float = model.config.shift_factor or 0.0
        self.latent_channels: int = model.config.latent_channels
        self.factor: int = 2 ** (len(model.config.block_out_channels) - 1)
        """Pixels per latent along a side."""
        self.sample_side_px: int = model.config.sample_size
        """The side of the pictures that it was trained on."""
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.tile_px = tile_px

    def digest(self) -> str:
        """Over everything that decides latents beside the device."""
        constants = self._scaling_factor, self._shift_factor
        digest = hashlib.sha256(repr(constants).encode())
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, picture_HW3: Tensor) -> Tensor:
        """The mean latents of a uint8 RGB picture, float32 on the VAE's device."""
        factor = self.factor

        def mean_of(rows: slice, columns: slice) -> Tensor:
            part_HW3 = picture_HW3[
                rows.start * factor : rows.stop * factor,
                columns.start * factor : columns.stop * factor,
            ]
            unit_CHW = part_HW3.to(self._model.device).permute(2, 0, 1).to(self._model.dtype) / 255
            encoded = self._model.encode((2 * unit_CHW - 1).unsqueeze(0))
            mean_CHW: Tensor = encoded.latent_dist.mean.squeeze(0)
            return mean_CHW

        height, width, _ = picture_HW3.shape
        mean_CHW = self._whole_or_tiled(mean_of, (height // factor, width // factor), 1)
        return (mean_CHW.float() - self._shift_factor) * self._scaling_factor

    @torch.inference_mode()
    def decode(self, latents_CHW: Tensor) -> tuple[Tensor, Tensor]:
        """The picture as uint8 RGB, rounded as diffusers' image processor does; and whether it came
        of numbers alone, on the device as well: each answer from there is waited for."""
        scaled_CHW = (
            latents_CHW.to(self._model.device, self._model.dtype) / self._scaling_factor
            + self._shift_factor
        )

        def image_of(rows: slice, columns: slice) -> Tensor:
            part_CHW = scaled_CHW[:, rows, columns]
            image_CHW: Tensor = self._model.decode(part_CHW.unsqueeze(0), return_dict=False)[0]
            return image_CHW.squeeze(0)

        _, height, width = latents_CHW.shape
        image_CHW = self._whole_or_tiled(image_of, (height, width), self.factor)
        unit_CHW = (image_CHW * 0.5 + 0.5).clamp(0, 1)
        picture: Tensor = (unit_CHW.permute(1, 2, 0).float() * 255).round().to(torch.uint8)
        return picture.contiguous(), image_CHW.isfinite().all()

    def _whole_or_tiled(
        self, work: Callable[[slice, slice], Tensor], grid: tuple[int, int], resolution: int
    ) -> Tensor:
        height, width = grid
        if self.tile_px is None:
            is_large = height * width * self.factor**2 > _WHOLE_PX**2
            side_px, overlap_px = LARGE_TILE_PX, _OVERLAP_PX
        else:
            is_large = max(height, width) * self.factor > self.tile_px
            side_px, overlap_px = self.tile_px, self.tile_px // 8
        if not is_large:
            return work(slice(0, height), slice(0, width))
        tiling = Tiling(side_px // self.factor, overlap_px // self.factor)
        return tiled(work, grid, resolution, tiling, self._model.device)
