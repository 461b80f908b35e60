"""Samples to learn from, by chance."""

from collections.abc import Sequence

import torch

from dit_service.training.training import Example


def drawn_batch(
    width: int, sizes: Sequence[tuple[int, int]], lengths: Sequence[int], number: int = 0
) -> list[Example]:
    """The one of that number: latents of those sizes, captions of those lengths."""
    generator = torch.Generator().manual_seed(number)
    return [
        Example(
            torch.randn(16, *size, generator=generator),
            torch.randn(length, width, generator=generator),
            1 / len(sizes),
        )
        for size, length in zip(sizes, lengths, strict=True)
    ]
