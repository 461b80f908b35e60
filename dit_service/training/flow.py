"""Flow matching: what is learnt from, and what should come of it.

Sigma is the share of noise; the model is told the time, 1 - sigma, and predicts data minus noise.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dit_service.training.draws import generator
from zimage_core.planning.schedule import OFFICIAL, sigmas
from zimage_core.planning.training import Noise


@dataclass(frozen=True, eq=False)
class Noised:
    """A sample on its way to noise."""

    latents_CHW: Tensor
    time: float
    velocity_CHW: Tensor
    """What the model should predict."""


def noised(latents_CHW: Tensor, noise: Noise, seed: int, *place: int) -> Noised:
    """The sample with the noise of its place, such as its step and its number there."""
    sigma = _sigma(noise, generator(seed, "sigma", *place))
    return _mixed(latents_CHW, sigma, generator(seed, "noise", *place))


def placed(latents_CHW: Tensor, noise: Noise, quantile: float, seed: int, *place: int) -> Noised:
    """The sample with as much noise as that share of what is drawn has less of."""
    return _mixed(latents_CHW, _sigma_at(noise, quantile), generator(seed, "held out", *place))


def loss(velocity_CHW: Tensor, wanted_CHW: Tensor, mask_HW: Tensor | None = None) -> Tensor:
    """The mean square of what is missing, by the weights of a mask where there is one: what is
    learnt of a small part is learnt as fast as of a whole."""
    squares_CHW = (velocity_CHW - wanted_CHW).square()
    if mask_HW is None:
        return squares_CHW.mean()
    return (squares_CHW.mean(0) * mask_HW).sum() / mask_HW.sum()


def _mixed(latents_CHW: Tensor, sigma: float, own: torch.Generator) -> Noised:
    drawn_CHW = torch.randn(latents_CHW.shape, generator=own).to(latents_CHW.device)
    return Noised(torch.lerp(latents_CHW, drawn_CHW, sigma), 1 - sigma, latents_CHW - drawn_CHW)


def _sigma_at(noise: Noise, quantile: float) -> float:
    if noise.distribution == "schedule":
        levels = sorted(sigmas(OFFICIAL, noise.step_count, noise.shift)[:-1])
        return levels[int(quantile * len(levels))]
    drawn = quantile
    if noise.distribution == "logit_normal":
        normal = noise.mean + noise.deviation * NormalDist().inv_cdf(quantile)
        drawn = 1 / (1 + math.exp(-normal))
    return _shifted(drawn, noise.shift)


def _shifted(drawn: float, shift: float) -> float:
    return shift * drawn / (1 + (shift - 1) * drawn)


def _sigma(noise: Noise, own: torch.Generator) -> float:
    """In float32, as the model is told it."""
    if noise.distribution == "schedule":
        levels = sigmas(OFFICIAL, noise.step_count, noise.shift)[:-1]
        return levels[int(torch.randint(len(levels), (), generator=own))]
    if noise.distribution == "logit_normal":
        normal = torch.randn((), generator=own)
        drawn = float(torch.sigmoid(noise.mean + noise.deviation * normal))
    else:
        drawn = float(torch.rand((), generator=own))
    return _shifted(drawn, noise.shift)
