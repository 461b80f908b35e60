"""The text encoder: Qwen3's own layers as transformers has them, run over packed prompts."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from zimage_core.errors import Cancelled, NotReady

_PACKED_ATTENTION = "zimage_packed"


class Qwen3Encoder(nn.Module):
    """The token table, as many layers as the deepest hidden state needs, and the final norm if that
    is the last one. Hidden states are those of transformers, counted from the end: -1 is after the
    final norm, -2 the output of the last but one layer."""

    def __init__(self, config: Qwen3Config, deepest: int) -> None:
        super().__init__()
        config = copy(config)
        config._attn_implementation = _PACKED_ATTENTION
        self.layer_count = config.num_hidden_layers
        self.width = config.hidden_size
        self.deepest = deepest
        run = min(self.layer_count + 1 + deepest, self.layer_count)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, index) for index in range(run))
        self.norm: nn.Module = nn.Identity()
        if deepest == -1:
            self.norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        with torch.device("cpu"):  # computed and not loaded, so it must be real where it is made
            self.rotary_emb = Qwen3RotaryEmbedding(config)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Sequence[Sequence[int]],
        hidden_layers: Sequence[int],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Tensor]:
        """For each prompt the hidden state it asks for, [its token count, width]. Each linear runs
        once over the tokens of all prompts, without padding; no prompt sees another. Raises
        Cancelled after the layer at which nobody waits any more."""
        self._refuse_unknown_tokens(token_ids)
        lengths = [len(ids) for ids in token_ids]
        wanted = [self.layer_count + 1 + layer for layer in hidden_layers]
        taken: dict[int, Tensor] = {}
        for depth, state in zip(range(max(wanted) + 1), self._states(token_ids), strict=False):
            if is_cancelled():
                raise Cancelled("nobody waits for these prompts any more")
            rows = state.squeeze(0).split(lengths)
            taken |= {index: rows[index] for index, layer in enumerate(wanted) if layer == depth}
        return [taken[index] for index in range(len(lengths))]

    def _refuse_unknown_tokens(self, token_ids: Sequence[Sequence[int]]) -> None:
        """A GPU would be lost to this process after looking up one of them."""
        highest, rows = max(map(max, token_ids)), self.embed_tokens.num_embeddings
        if highest >= rows:
            raise NotReady(
                f"token {highest} is not among the {rows} that the text encoder knows: "
                "the tokenizer beside it belongs to another model",
                reason="TOKENIZER_MISMATCH",
                fields={"given": str(highest), "allowed": f"0 to {rows - 1}"},
            )

    def _states(self, token_ids: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """The hidden states from the token table on, [1, all tokens, width], one by one."""
        lengths = [len(ids) for ids in token_ids]
        device = self.embed_tokens.weight.device
        packed = torch.tensor([token for ids in token_ids for token in ids], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        state = self.embed_tokens(packed).unsqueeze(0)
        rotation = self.rotary_emb(state, positions.unsqueeze(0))
        yield state
        for depth, layer in enumerate(self.layers, 1):
            state = layer(state, position_embeddings=rotation, prompt_lengths=lengths)
            yield state if depth < self.layer_count else self.norm(state)


def _attend_within_prompts(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    prompt_lengths: list[int],
    scaling: float,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each prompt alone, from [1, heads, tokens, head size] to [1, tokens,
    heads, head size]. One call per prompt keeps the fast kernel; a mask over all prompts would
    leave it and cost the square of all tokens."""
    if query.device.type == "mps":  # not every torch we support shares key heads there
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    prompts = zip(*(part.split(prompt_lengths, dim=2) for part in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in prompts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


AttentionInterface.register(_PACKED_ATTENTION, _attend_within_prompts)
