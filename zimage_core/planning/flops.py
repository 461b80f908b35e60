"""How much arithmetic and memory the models take, from the plain numbers of their configs.

A multiply-add counts as two operations, as in torch's FlopCounterMode; elementwise work counts as
none. Attention counts in full, also where it is causal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zimage_core.planning.limits import padded

TIME_FREQUENCIES = 256
"""The width of the sinusoidal code of a moment, before its two linears."""

TIME_HIDDEN = 1024
"""The width between those linears; the architecture fixes both."""


@dataclass(frozen=True, kw_only=True)
class DitShape:
    """The sizes of a Z-Image transformer, under the names of its config file where that has one."""

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    in_channels: int
    cap_feat_dim: int
    patch_size: int

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """The inner width of the feed-forward part, rounded in the order of the trained weights."""
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        """The width of the embedding that modulates the blocks."""
        return min(self.dim, 256)

    @property
    def patch_dim(self) -> int:
        """How many latent values make one image token."""
        return self.in_channels * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes of a Qwen3 text encoder, under the names of its config file."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


def dit_block_flops(shape: DitShape, rows: int) -> int:
    """One block over one sequence."""
    return 2 * rows * _dit_block_weights(shape) + 4 * rows**2 * shape.dim


def dit_step_flops(shape: DitShape, samples: Iterable[tuple[int, int]]) -> int:
    """One forward over samples of (image tokens without pads, caption rows with pads)."""
    total = 0
    for image_tokens, caption_rows in samples:
        image_rows = padded(image_tokens)
        total += 2 * shape.dim * shape.patch_dim * (image_tokens + image_rows)  # in and out
        total += shape.n_refiner_layers * dit_block_flops(shape, image_rows)
        total += shape.n_layers * dit_block_flops(shape, image_rows + caption_rows)
    return total


def dit_caption_flops(shape: DitShape, token_counts: Iterable[int]) -> int:
    """What the prompts of one call cost before their first step."""
    return sum(
        2 * tokens * shape.cap_feat_dim * shape.dim
        + shape.n_refiner_layers * dit_block_flops(shape, padded(tokens))
        for tokens in token_counts
    )


def dit_modulation_flops(shape: DitShape, step_count: int) -> int:
    """What a schedule costs before its first step."""
    modulated_blocks = shape.n_layers + shape.n_refiner_layers
    embedding = TIME_FREQUENCIES * TIME_HIDDEN + TIME_HIDDEN * shape.time_dim
    modulation = shape.time_dim * shape.dim * (4 * modulated_blocks + 1)
    return 2 * step_count * (embedding + modulation)


def dit_row_elements(shape: DitShape) -> int:
    """How many values of one token a forward holds at its widest: where keys are rotated, beside
    the stream twice, its norm, queries and keys two copies in float32. The feed-forward part holds
    a little less."""
    return 9 * shape.dim


def dit_parameter_count(shape: DitShape) -> int:
    """The number of weights; times the bytes of an element it is the memory they take."""
    modulation = 4 * shape.dim * (shape.time_dim + 1)
    norms = 4 * shape.dim + 2 * shape.head_dim
    block = _dit_block_weights(shape) + norms
    blocks = block * (shape.n_layers + 2 * shape.n_refiner_layers)
    blocks += modulation * (shape.n_layers + shape.n_refiner_layers)
    time = TIME_HIDDEN * (TIME_FREQUENCIES + 1) + shape.time_dim * (TIME_HIDDEN + 1)
    caption = shape.cap_feat_dim + shape.dim * (shape.cap_feat_dim + 1)
    image_in = shape.dim * (shape.patch_dim + 1)
    image_out = shape.patch_dim * (shape.dim + 1) + shape.dim * (shape.time_dim + 1)
    pad_tokens = 2 * shape.dim
    return blocks + time + caption + image_in + image_out + pad_tokens


def encoder_flops(shape: EncoderShape, layer_count: int, token_counts: Sequence[int]) -> int:
    """The first `layer_count` layers over prompts of these lengths, packed without padding."""
    attention_dim = shape.num_attention_heads * shape.head_dim
    return layer_count * sum(
        2 * tokens * _encoder_layer_weights(shape) + 4 * tokens**2 * attention_dim
        for tokens in token_counts
    )


def encoder_parameter_count(shape: EncoderShape, layer_count: int) -> int:
    """The embedding table and the first `layer_count` layers, without the final norm."""
    norms = 2 * shape.hidden_size + 2 * shape.head_dim
    layers = layer_count * (_encoder_layer_weights(shape) + norms)
    return shape.vocab_size * shape.hidden_size + layers


def _dit_block_weights(shape: DitShape) -> int:
    return 4 * shape.dim**2 + 3 * shape.dim * shape.ffn_dim


def _encoder_layer_weights(shape: EncoderShape) -> int:
    queries_and_output = 2 * shape.num_attention_heads * shape.head_dim
    keys_and_values = 2 * shape.num_key_value_heads * shape.head_dim
    width = queries_and_output + keys_and_values + 3 * shape.intermediate_size
    return shape.hidden_size * width
