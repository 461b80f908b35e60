"""Rotary positions along three axes, with real numbers alone.

Shapes: T tokens, H heads, E the width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_service.model.config import TransformerConfig


class Rope(NamedTuple):
    """The rotation of every token, float32, laid out so that neighbours in a pair meet by a shift.

    Pair i of a head is the elements 2i and 2i + 1. The even one takes -sin of the next element, the
    odd one sin of the previous, and the tables hold zeros in between. Both are one element short:
    the last element has no next and the first no previous.
    """

    cos_T1E: Tensor
    from_next_T1E: Tensor
    from_previous_T1E: Tensor


class RopeTables:
    """Cosines and sines of every position of every axis; fixed by the config, kept on the CPU."""

    def __init__(self, config: TransformerConfig) -> None:
        self._angles = [
            _angles(dim, length, config.rope_theta)
            for dim, length in zip(config.axes_dims, config.axes_lens, strict=True)
        ]

    def at(self, positions_T3: Tensor, device: torch.device) -> Rope:
        """The rotations of tokens at these positions; one outside the tables is an IndexError."""
        angles_TE = torch.cat(
            [angles[positions_T3[:, axis]] for axis, angles in enumerate(self._angles)], dim=-1
        ).repeat_interleave(2, dim=-1)
        cos_T1E, sin_T1E = angles_TE.cos().unsqueeze(1), angles_TE.sin().unsqueeze(1)
        even_E = torch.arange(angles_TE.shape[-1], device="cpu") % 2 == 0
        return Rope(
            cos_T1E.to(device),
            torch.where(even_E, -sin_T1E, 0.0)[..., :-1].contiguous().to(device),
            torch.where(even_E, 0.0, sin_T1E)[..., 1:].contiguous().to(device),
        )


def rotate(x_THE: Tensor, rope: Rope) -> Tensor:
    """Turns queries or keys by their positions, in float32 whatever their type."""
    x = x_THE.float()
    rest = x.shape[-1] - 1
    turned_THE = x * rope.cos_T1E
    turned_THE.narrow(-1, 0, rest).addcmul_(x.narrow(-1, 1, rest), rope.from_next_T1E)
    turned_THE.narrow(-1, 1, rest).addcmul_(x.narrow(-1, 0, rest), rope.from_previous_T1E)
    return turned_THE.to(x_THE.dtype)


def _angles(dim: int, length: int, theta: float) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    return torch.outer(positions, 1.0 / theta**exponents).float()
