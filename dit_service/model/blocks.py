"""The transformer's block and its parts, over packed tokens; parameters carry diffusers' names.

Shapes: T packed tokens, S samples, N moments of a schedule, D the model's width, A the time
embedding's, H heads, E the width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dit_service.model.adapters import NOTHING, BesidePart
from dit_service.model.attention.backends import attend
from dit_service.model.config import TransformerConfig
from dit_service.model.layout import Segments, per_token
from dit_service.model.rope import rotate

_FLOAT16_SHARE = 2.0**-5
"""What attention and feed-forward part give is larger than float16 can hold in a trained model. So
there they give a share, and the norm behind each makes up for it exactly."""
_HEAD_NORM_EPS = 1e-5  # fixed by the architecture; norm_eps of the config is for the rows


class RMSNorm(nn.Module):
    """Brings rows to unit mean square, then weighs their elements."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def normalised(self, x: Tensor, share: float = 1.0) -> Tensor:
        """The rows before the weight, rounded to the weight's type as the reference does; of rows
        that are but that share of what they should be, the same."""
        eps = self.eps * share**2
        return functional.rms_norm(x, self.weight.shape, eps=eps).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The whole norm."""
        return self.normalised(x).mul_(self.weight)


class Attention(nn.Module):
    """Multi-head attention with normed queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(config.head_dim, _HEAD_NORM_EPS)
        self.norm_k = RMSNorm(config.head_dim, _HEAD_NORM_EPS)

    def looks(
        self, x_TD: Tensor, segments: Segments, beside: BesidePart
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: what each token wants of all tokens of its own sample, and
        gives."""
        q_THE = rotate(self.norm_q(self._heads("to_q", x_TD, beside)), segments.rope)
        k_THE = rotate(self.norm_k(self._heads("to_k", x_TD, beside)), segments.rope)
        return q_THE, k_THE, self._heads("to_v", x_TD, beside)

    def gets(self, attended_THE: Tensor, beside: BesidePart) -> Tensor:
        """What comes of what it got."""
        attended_TD = attended_THE.flatten(1)
        return beside.through(self.to_out[0], "attention.to_out.0", _shared(attended_TD))

    def _heads(self, name: str, x_TD: Tensor, beside: BesidePart) -> Tensor:
        through_TD = beside.through(getattr(self, name), f"attention.{name}", x_TD)
        heads_THE: Tensor = through_TD.unflatten(-1, (-1, self.head_dim))
        return heads_THE


class FeedForward(nn.Module):
    """The gated feed-forward part (SwiGLU)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x_TD: Tensor, beside: BesidePart) -> Tensor:
        """In place where no gradient needs what was there: these are the widest tensors of a
        forward."""
        opened = beside.through(self.w1, "feed_forward.w1", x_TD)
        gate = functional.silu(opened, inplace=not torch.is_grad_enabled())
        gated = _shared(gate).mul_(beside.through(self.w3, "feed_forward.w3", x_TD))
        return beside.through(self.w2, "feed_forward.w2", gated)


class Block(nn.Module):
    """Attention and feed-forward, each between two norms.

    A block sees modulation as four vectors per sample that stand in for the weights of its four
    norms: scales and gates are multiplied into those weights beforehand, once per schedule.
    """

    def __init__(self, config: TransformerConfig, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.time_dim, 4 * config.dim))

    def norm_weights(self) -> Tensor:
        """The four vectors of a block without modulation, as for one sample."""
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        return torch.stack([norm.weight for norm in norms]).unsqueeze(0)

    def modulated_norm_weights(self, time_NA: Tensor, beside: BesidePart) -> Tensor:
        """The four at every moment, [N, 4, D]: a scale before each part, a gate behind it."""
        modulation = beside.through(self.adaLN_modulation[0], "adaLN_modulation.0", time_NA)
        scale1_ND, gate1_ND, scale2_ND, gate2_ND = modulation.chunk(4, dim=-1)
        factors = [1 + scale1_ND, gate1_ND.tanh(), 1 + scale2_ND, gate2_ND.tanh()]
        return torch.stack(factors, dim=1) * self.norm_weights()

    def forward(
        self,
        x_TD: Tensor,
        norm_weights_S4D: Tensor,
        segments: Segments,
        backend: str,
        beside: BesidePart = NOTHING,
    ) -> Tensor:
        """One step of the residual stream; `norm_weights_S4D` may be one row for all samples. What
        has no name here is gone at once: the feed-forward part wants the memory."""
        return self.behind_attention(
            x_TD,
            attend(
                backend,
                *self.before_attention(x_TD, norm_weights_S4D, segments, beside),
                segments,
            ),
            norm_weights_S4D,
            segments,
            beside,
        )

    def before_attention(
        self, x_TD: Tensor, norm_weights_S4D: Tensor, segments: Segments, beside: BesidePart
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        before, *_ = norm_weights_S4D.unbind(1)
        normed_TD = self.attention_norm1.normalised(x_TD).mul_(per_token(before, segments))
        return self.attention.looks(normed_TD, segments, beside)

    def behind_attention(
        self,
        x_TD: Tensor,
        attended_THE: Tensor,
        norm_weights_S4D: Tensor,
        segments: Segments,
        beside: BesidePart,
    ) -> Tensor:
        """What comes of what they found."""
        _, after_attention, before_ffn, after_ffn = norm_weights_S4D.unbind(1)
        share = _share(x_TD.dtype)
        attended_TD = self.attention_norm2.normalised(
            self.attention.gets(attended_THE, beside), share
        )
        x_TD = torch.addcmul(x_TD, per_token(after_attention, segments), attended_TD)
        del attended_TD
        fed_TD = self.ffn_norm2.normalised(
            self.feed_forward(
                self.ffn_norm1.normalised(x_TD).mul_(per_token(before_ffn, segments)), beside
            ),
            share,
        )
        return torch.addcmul(x_TD, per_token(after_ffn, segments), fed_TD)


def _share(dtype: torch.dtype) -> float:
    return _FLOAT16_SHARE if dtype == torch.float16 else 1.0


def _shared(x_TD: Tensor) -> Tensor:
    share = _share(x_TD.dtype)
    return x_TD if share == 1 else x_TD.mul_(share)


def run_block(
    block: Block,
    x_TD: Tensor,
    norm_weights_S4D: Tensor,
    segments: Segments,
    backend: str,
    beside: BesidePart,
) -> Tensor:
    """A block's step, as the one thing that is compiled for all blocks."""
    out_TD: Tensor = block(x_TD, norm_weights_S4D, segments, backend, beside)
    return out_TD
