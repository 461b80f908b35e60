"""Small pictures from latents without the VAE: a linear map, one pixel for each latent.

The map is fitted when the model is loaded, by least squares on procedural pictures that went
through the VAE's encoder; half of them measure how much it tells of pictures that it has not seen.
Shapes: a picture of H x W pixels has h x w latents of C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from dit_service.model.vae import Vae

_PICTURES = 8
_SIDE_LATENTS = 16
_SEED = 0


@dataclass(frozen=True)
class LinearPreview:
    """The map, with how good it is."""

    weight_C3: Tensor
    bias_3: Tensor
    r_squared: float
    """On pictures that it was not fitted to: 1 is perfect, 0 no better than grey."""

    def render(self, latents_CHW: Tensor) -> Tensor:
        """The picture as uint8 RGB on the CPU."""
        unit_hw3 = latents_CHW.permute(1, 2, 0).float() @ self.weight_C3 + self.bias_3
        return (unit_hw3.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def fit(vae: Vae, device: torch.device) -> LinearPreview:
    """The best map for this VAE, for latents on that device."""
    pictures = procedural_pictures(_PICTURES, _SIDE_LATENTS * vae.factor)
    latents = [vae.encode(picture_HW3).flatten(1).T for picture_HW3 in pictures]
    targets = [_shrunk(picture_HW3, vae.factor) for picture_HW3 in pictures]
    half = _PICTURES // 2
    x, y = torch.cat(latents[:half]).cpu().double(), torch.cat(targets[:half]).double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    weight = torch.linalg.lstsq(x - x_mean, y - y_mean).solution
    bias = y_mean - x_mean @ weight
    x, y = torch.cat(latents[half:]).cpu().double(), torch.cat(targets[half:]).double()
    unexplained = (y - (x @ weight + bias)).square().sum() / (y - y.mean(0)).square().sum()
    return LinearPreview(weight.float().to(device), bias.float().to(device), 1 - unexplained.item())


def procedural_pictures(count: int, side_px: int) -> list[Tensor]:
    """Colour fields from flat to grainy with hard edges in them, as uint8 [H, W, 3]; always the
    same ones."""
    generator = torch.Generator().manual_seed(_SEED)
    ramp = torch.linspace(-1, 1, side_px)
    pictures = []
    for index in range(count):
        cells = 2 ** (index % 4 + 1)
        field = torch.rand(1, 3, cells, cells, generator=generator)
        picture_3HW = interpolate(field, (side_px, side_px), mode="bilinear").squeeze(0)
        for _ in range(4):
            x, y, radius, *colour = torch.rand(6, generator=generator).tolist()
            far_HW = torch.hypot(*torch.meshgrid(ramp - 2 * y + 1, ramp - 2 * x + 1, indexing="ij"))
            inside_HW = far_HW < 0.6 * radius
            picture_3HW = torch.where(inside_HW, torch.tensor(colour).view(3, 1, 1), picture_3HW)
        pictures.append((picture_3HW.permute(1, 2, 0) * 255).round().to(torch.uint8))
    return pictures


def _shrunk(picture_HW3: Tensor, factor: int) -> Tensor:
    """Its pixels at the size of its latents, from 0 to 1, in rows of RGB."""
    return avg_pool2d(picture_HW3.permute(2, 0, 1).float() / 255, factor).flatten(1).T
