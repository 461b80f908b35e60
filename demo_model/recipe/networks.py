"""The transformer and the text encoder as training wants them: batches of equal shapes, attention
written out, parameters named as diffusers and transformers name theirs.

The services and diffusers run the same weights by their own code; a test holds the three together.
On a CPU and at these lengths written-out attention is a third faster, forward and backward, than
the fused kernel. Shapes: B samples of N tokens of width D; H heads of width E; L caption tokens.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TRANSFORMER: dict[str, Any] = {
    "dim": 192,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 128,
    "axes_dims": [16, 16, 16],
    "axes_lens": [544, 64, 64],
}
TEXT: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
}
"""Three of the four layers are used: hidden state -2 never sees the last."""

_THETA = 256.0
_TOKEN_MULTIPLE = 32
_PROBED_LAYER = 3
"""After so many layers a head reads what the tokens know, in training alone."""

Angles = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Rows of unit mean square, weighed."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """In float32 inside, in the type of `x` outside."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self._eps).to(x.dtype)


def attend(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, mask_NN: Tensor | None = None) -> Tensor:
    """Written-out attention."""
    scores = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHNE.transpose(-1, -2)
    if mask_NN is not None:
        scores = scores.masked_fill(mask_NN, -1e4)
    attended: Tensor = scores.softmax(-1).to(v_BHNE.dtype) @ v_BHNE
    return attended


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


class Attention(nn.Module):
    """Of the transformer: normed queries and keys, rotated in neighbouring pairs."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.to_q, self.to_k, self.to_v = (_linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([_linear(dim, dim)])
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, 1e-5) for _ in range(2))

    def forward(self, x_BND: Tensor, angles: Angles) -> Tensor:
        """Every token looks at every other."""
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        q, k, v = functional.linear(x_BND, weight).unflatten(-1, (3, self._heads, -1)).unbind(2)
        q, k = _rotated(self.norm_q(q), angles), _rotated(self.norm_k(k), angles)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        result: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        between = int(dim / 3 * 8)
        self.w1, self.w3 = _linear(dim, between), _linear(dim, between)
        self.w2 = _linear(between, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Gate and value in one product."""
        weight = torch.cat([self.w1.weight, self.w3.weight])
        gate, value = functional.linear(x, weight).chunk(2, -1)
        out: Tensor = self.w2(functional.silu(gate) * value)
        return out


class Block(nn.Module):
    """Attention and feed-forward between norms; gates begin half open."""

    def __init__(self, dim: int, heads: int, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, 1e-5), RMSNorm(dim, 1e-5)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, 1e-5), RMSNorm(dim, 1e-5)
        if modulated:
            modulation = nn.Linear(min(dim, 256), 4 * dim)
            nn.init.normal_(modulation.weight, std=0.01)
            with torch.no_grad():
                modulation.bias.zero_()
                modulation.bias.view(4, dim)[[1, 3]] = 0.5
            self.adaLN_modulation = nn.Sequential(modulation)

    def forward(self, x_BND: Tensor, angles: Angles, time_BA: Tensor | None = None) -> Tensor:
        """One step of the residual stream."""
        if time_BA is None:
            attended = self.attention(self.attention_norm1(x_BND), angles)
            x_BND = x_BND + self.attention_norm2(attended)
            fed = self.feed_forward(self.ffn_norm1(x_BND))
            out: Tensor = x_BND + self.ffn_norm2(fed)
            return out
        modulation = self.adaLN_modulation(time_BA).unsqueeze(1)
        scale1, gate1, scale2, gate2 = modulation.chunk(4, 2)
        attended = self.attention(self.attention_norm1(x_BND) * (1 + scale1), angles)
        x_BND = x_BND + gate1.tanh() * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x_BND) * (1 + scale2))
        gated: Tensor = x_BND + gate2.tanh() * self.ffn_norm2(fed)
        return gated


class FinalLayer(nn.Module):
    """Tokens to the values of their patches; silent at first."""

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, values)
        modulation = nn.Linear(min(dim, 256), dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(modulation.weight, std=0.01)
        nn.init.zeros_(modulation.bias)

    def forward(self, x_BND: Tensor, time_BA: Tensor) -> Tensor:
        """The predicted values."""
        scale = 1 + self.adaLN_modulation(time_BA).unsqueeze(1)
        normed = functional.layer_norm(x_BND.float(), x_BND.shape[-1:], eps=1e-6)
        out: Tensor = self.linear(normed.to(x_BND.dtype) * scale)
        return out


class TimeEmbedder(nn.Module):
    """A time as waves, then as a vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, dim))

    def forward(self, times_B: Tensor) -> Tensor:
        """One row for each time."""
        steps = torch.arange(128, device=times_B.device).float()
        waves = times_B.float()[:, None] * torch.exp(-math.log(10000) * steps / 128)
        out: Tensor = self.mlp(torch.cat([waves.cos(), waves.sin()], -1))
        return out


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a forward gives."""

    velocity: Tensor
    """[B, C, H, W]: data minus noise."""
    middle: Tensor
    """[B, tokens, D]: the image tokens half way."""


class Transformer(nn.Module):
    """The S3-DiT."""

    def __init__(self) -> None:
        super().__init__()
        dim, heads = TRANSFORMER["dim"], TRANSFORMER["n_heads"]

        def blocks(count: int, *, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, heads, modulated=modulated) for _ in range(count))

        self.all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(64, dim)})
        self.all_final_layer = nn.ModuleDict({"2-1": FinalLayer(dim, 64)})
        self.noise_refiner = blocks(TRANSFORMER["n_refiner_layers"])
        self.context_refiner = blocks(TRANSFORMER["n_refiner_layers"], modulated=False)
        self.layers = blocks(TRANSFORMER["n_layers"])
        self.t_embedder = TimeEmbedder(min(dim, 256))
        width = TRANSFORMER["cap_feat_dim"]
        self.cap_embedder = nn.Sequential(RMSNorm(width, 1e-5), nn.Linear(width, dim))
        self.x_pad_token = nn.Parameter(torch.randn(1, dim) * 0.02, requires_grad=False)
        self.cap_pad_token = nn.Parameter(torch.randn(1, dim) * 0.02)

    def forward(
        self, latents_BCHW: Tensor, times_B: Tensor, captions_BLF: Tensor, is_text_BL: Tensor
    ) -> Prediction:
        """`times_B` are 1 - sigma; L is a multiple of 32, what is no text becomes the pad token.
        Pictures have a multiple of 32 tokens."""
        _, channels, height, width = latents_BCHW.shape
        rows, columns = height // 2, width // 2
        assert rows * columns % _TOKEN_MULTIPLE == 0
        image, caption, joint = _angles(captions_BLF.shape[1], rows, columns, latents_BCHW.device)
        patches = latents_BCHW.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))
        x_BND = self.all_x_embedder["2-1"](
            patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        time_BA = self.t_embedder(times_B * 1000.0)
        for block in self.noise_refiner:
            x_BND = block(x_BND, image, time_BA)
        words_BLD = self.cap_embedder(captions_BLF)
        words_BLD = torch.where(
            is_text_BL[..., None], words_BLD, self.cap_pad_token.to(words_BLD.dtype)
        )
        for block in self.context_refiner:
            words_BLD = block(words_BLD, caption)
        x_BND = torch.cat([x_BND, words_BLD.to(x_BND.dtype)], 1)
        middle = x_BND
        for number, block in enumerate(self.layers, 1):
            x_BND = block(x_BND, joint, time_BA)
            if number == _PROBED_LAYER:
                middle = x_BND[:, : rows * columns]
        values = self.all_final_layer["2-1"](x_BND[:, : rows * columns], time_BA)
        grid = values.unflatten(2, (2, 2, channels)).unflatten(1, (rows, columns))
        return Prediction(grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).float(), middle)


class TextLayer(nn.Module):
    """A layer of Qwen3."""

    def __init__(self) -> None:
        super().__init__()
        dim, wide, between = TEXT["hidden_size"], TEXT["head_dim"], TEXT["intermediate_size"]
        heads, shared = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
        self._heads, self._shared = heads, shared
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": _linear(dim, heads * wide),
                "k_proj": _linear(dim, shared * wide),
                "v_proj": _linear(dim, shared * wide),
                "o_proj": _linear(heads * wide, dim),
                "q_norm": RMSNorm(wide, 1e-6),
                "k_norm": RMSNorm(wide, 1e-6),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": _linear(dim, between),
                "up_proj": _linear(dim, between),
                "down_proj": _linear(between, dim),
            }
        )
        self.input_layernorm = RMSNorm(dim, 1e-6)
        self.post_attention_layernorm = RMSNorm(dim, 1e-6)

    def forward(self, x_BND: Tensor, angles: Angles, hidden_NN: Tensor) -> Tensor:
        """Every token looks at those before it."""
        own, normed = self.self_attn, self.input_layernorm(x_BND)
        q = own["q_norm"](own["q_proj"](normed).unflatten(-1, (self._heads, -1)))
        k = own["k_norm"](own["k_proj"](normed).unflatten(-1, (self._shared, -1)))
        v = own["v_proj"](normed).unflatten(-1, (self._shared, -1))
        repeats = self._heads // self._shared
        q = _rotated_halves(q, angles).transpose(1, 2)
        k = _rotated_halves(k, angles).transpose(1, 2).repeat_interleave(repeats, 1)
        v = v.transpose(1, 2).repeat_interleave(repeats, 1)
        x_BND = x_BND + own["o_proj"](attend(q, k, v, hidden_NN).transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x_BND)
        gate = functional.silu(self.mlp["gate_proj"](normed))
        out: Tensor = x_BND + self.mlp["down_proj"](gate * self.mlp["up_proj"](normed))
        return out


class TextEncoder(nn.Module):
    """Qwen3 up to the last layer but one: what hidden state -2 needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TEXT["vocab_size"], TEXT["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(TextLayer() for _ in range(TEXT["num_hidden_layers"] - 1))

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        """Hidden state -2."""
        count, wide = token_ids_BL.shape[1], TEXT["head_dim"]
        device = token_ids_BL.device
        steps = torch.arange(0, wide, 2, device=device).float() / wide
        positions = torch.arange(count, device=device).float()[:, None]
        waves = (positions / TEXT["rope_theta"] ** steps).repeat(1, 2)[None, :, None, :]
        hidden = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
        x_BND: Tensor = self.embed_tokens(token_ids_BL)
        for layer in self.layers:
            x_BND = layer(x_BND, (waves.cos(), waves.sin()), hidden)
        return x_BND


def _rotated(x_BNHE: Tensor, angles: Angles) -> Tensor:
    cosine, sine = (angle[None, :, None, :] for angle in angles)
    even, odd = x_BNHE.float()[..., 0::2], x_BNHE.float()[..., 1::2]
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
    return turned.flatten(-2).to(x_BNHE.dtype)


def _rotated_halves(x_BNHE: Tensor, angles: Angles) -> Tensor:
    cosine, sine = angles
    x = x_BNHE.float()
    first, second = x.chunk(2, -1)
    return (x * cosine + torch.cat([-second, first], -1) * sine).to(x_BNHE.dtype)


@cache
def _angles(
    words: int, rows: int, columns: int, device: torch.device
) -> tuple[Angles, Angles, Angles]:
    """Of the picture's tokens, the caption's, and both: the picture stands behind its caption."""
    caption = torch.zeros(words, 3, dtype=torch.float64)
    caption[:, 0] = torch.arange(1, words + 1)
    image = torch.zeros(rows, columns, 3, dtype=torch.float64)
    image[..., 0] = words + 1
    image[..., 1] = torch.arange(rows).unsqueeze(1)
    image[..., 2] = torch.arange(columns)
    image = image.flatten(0, 1)

    def turned(positions: Tensor) -> Angles:
        parts = []
        for axis, wide in enumerate(TRANSFORMER["axes_dims"]):
            steps = torch.arange(0, wide, 2).double() / wide
            parts.append(positions[:, axis, None] / _THETA**steps)
        angle = torch.cat(parts, 1)
        return angle.cos().float().to(device), angle.sin().float().to(device)

    return turned(image), turned(caption), turned(torch.cat([image, caption]))
