"""A moment of the schedule as the vector that modulates the blocks.

Shapes: N moments, A the width of the embedding.
"""

import math

import torch
from torch import Tensor, nn

from dit_service.model.adapters import BesidePart
from zimage_core.planning.flops import TIME_FREQUENCIES, TIME_HIDDEN

_LONGEST_PERIOD = 10000.0


class TimeEmbedder(nn.Module):
    """Sinusoids through two linears."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, dim)
        )

    def forward(self, times_N: Tensor, beside: BesidePart) -> Tensor:
        """[N, A]; the sinusoids are float32, what follows has the weights' type."""
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=times_N.device) / half
        angles = times_N.float().unsqueeze(1) * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        first, activation, second = self.mlp
        hidden = beside.through(first, "mlp.0", sinusoids.to(next(first.parameters()).dtype))
        return beside.through(second, "mlp.2", activation(hidden))
