"""How good an autoencoder is: in decibels, and whether the checker still sees the scene."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from demo_model import checker, drawing, world

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Of pictures with a thing that training never showed."""

    psnr: float
    """The mean over pictures, in decibels."""
    worst_psnr: float
    passed: float
    """The share of pictures in which the checker still sees everything."""


@torch.inference_mode()
def reconstruction(autoencoder: Any, device: torch.device, count: int = 200) -> Reconstruction:
    """Draws scenes, encodes and decodes them, and looks."""
    chance = random.Random("reconstruction")  # noqa: S311 - no secret
    scenes = [world.any_scene(chance, held_out=True) for _ in range(count)]
    pictures = np.stack([drawing.draw(scene, world.CANVASES[0], chance) for scene in scenes])
    again = []
    for at in range(0, count, _AT_ONCE):
        levels = torch.from_numpy(pictures[at : at + _AT_ONCE]).to(device).float() / 127.5 - 1
        latents = autoencoder.encode(levels.permute(0, 3, 1, 2)).latent_dist.mean
        unit = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        again.append((unit.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy())
    made = np.concatenate(again)
    errors = ((made.astype(float) - pictures) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / errors)
    pairs = zip(made, scenes, strict=True)
    passed = [all(checker.check(picture, scene).values()) for picture, scene in pairs]
    return Reconstruction(float(psnr.mean()), float(psnr.min()), float(np.mean(passed)))
