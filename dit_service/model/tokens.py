"""Latents to tokens and back, and the tokens of several samples into one sequence.

Shapes: C latent channels of H x W, K tokens of P values, T packed tokens, D the model's width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_service.model.layout import Layout, SampleShape
from zimage_core.planning.limits import padded


def patchify(latents_CHW: Tensor, patch: int) -> Tensor:
    """Cuts latents into square patches, row by row; inside a token the channel runs fastest."""
    channels, height, width = latents_CHW.shape
    grid = latents_CHW.view(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def unpatchify(values_KP: Tensor, shape: SampleShape, patch: int) -> Tensor:
    """Puts the patches of one sample together again; its pads are left out."""
    values = values_KP.narrow(0, 0, shape.image_tokens)
    grid = values.view(shape.grid_height, shape.grid_width, patch, patch, -1)
    return grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)


def pad_samples(tokens_TD: Tensor, lengths: Sequence[int], pad_1D: Tensor) -> Tensor:
    """Fills each packed sample up to its padded length with the learned pad token."""
    if all(length == padded(length) for length in lengths):
        return tokens_TD
    pieces: list[Tensor] = []
    for sample in tokens_TD.split(list(lengths)):
        pieces += [sample, pad_1D.expand(padded(len(sample)) - len(sample), -1)]
    return torch.cat(pieces)


def join(image_TD: Tensor, captions: Sequence[Tensor], layout: Layout) -> Tensor:
    """Puts each picture's caption behind it."""
    pieces: list[Tensor] = []
    for image, caption in zip(image_TD.split(list(layout.image.lengths)), captions, strict=True):
        pieces += [image, caption]
    return torch.cat(pieces)


def image_rows(joint_TD: Tensor, layout: Layout) -> Tensor:
    """Takes the captions away again."""
    samples = joint_TD.split(list(layout.joint.lengths))
    pairs = zip(samples, layout.image.lengths, strict=True)
    return torch.cat([sample.narrow(0, 0, length) for sample, length in pairs])
