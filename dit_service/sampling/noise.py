"""The noise that a picture starts from: the same on every device, because the CPU draws it."""

import torch
from torch import Tensor


def initial_noise(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """float32 [C, H, W]; equals diffusers' noise for a CPU generator with this seed."""
    generator = torch.Generator("cpu").manual_seed(seed % 2**64)
    return torch.randn((1, *shape), generator=generator, dtype=torch.float32).squeeze(0)
