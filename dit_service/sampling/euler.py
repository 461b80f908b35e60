"""Text to image: Euler steps along the velocity, from noise to data."""

from itertools import pairwise

from torch import Tensor

from dit_service.sampling.forwards import NEGATIVE, POSITIVE, Forward, Sampler, Step
from dit_service.sampling.guidance import guided
from zimage_core.planning.schedule import is_guided


def text_to_image(
    noise_CHW: Tensor,
    sigmas: tuple[float, ...],
    guidance: float,
    cfg_normalization: float,
    cfg_truncation: float,
) -> Sampler:
    """`sigmas` fall from 1 to the final 0; the latents are float32 throughout."""
    latents_CHW, velocity_CHW = noise_CHW, None
    for sigma, following in pairwise(sigmas):
        positive = Forward(latents_CHW, 1 - sigma, POSITIVE)
        if is_guided(sigma, guidance, cfg_truncation):
            negative = Forward(latents_CHW, 1 - sigma, NEGATIVE)
            with_text, without = yield Step((positive, negative), velocity_CHW)
            velocity_CHW = guided(with_text, without, guidance, cfg_normalization)
        else:
            (velocity_CHW,) = yield Step((positive,), velocity_CHW)
        latents_CHW = latents_CHW + (sigma - following) * velocity_CHW
    return latents_CHW
