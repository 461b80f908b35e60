"""The transformer's last part: image tokens to the values of their patches.

Shapes: T packed tokens, S samples, N moments of a schedule, D the model's width, A the time
embedding's, P the values of a patch.
"""

from torch import Tensor, nn
from torch.nn import functional

from dit_service.model.adapters import BesidePart
from dit_service.model.config import TransformerConfig
from dit_service.model.layout import Segments, per_token

_EPS = 1e-6  # fixed by the architecture


class FinalLayer(nn.Module):
    """The one layer norm of the model, a scale and a linear."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def scale(self, time_NA: Tensor, beside: BesidePart) -> Tensor:
        """What the layer needs of every moment, [N, D]."""
        activation, linear = self.adaLN_modulation
        return 1 + beside.through(linear, "adaLN_modulation.1", activation(time_NA))

    def forward(
        self, x_TD: Tensor, scale_SD: Tensor, segments: Segments, beside: BesidePart
    ) -> Tensor:
        """`scale_SD` may be one row for all samples."""
        normed_TD = functional.layer_norm(x_TD, x_TD.shape[-1:], eps=_EPS)
        scaled_TD = normed_TD.mul_(per_token(scale_SD, segments))
        return beside.through(self.linear, "linear", scaled_TD)
