"""The text encoder: Qwen3's own layers as transformers has them, run over packed prompts."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
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

from encoder_service.model import linear
from zimage_core.embeddings import Blend
from zimage_core.errors import Cancelled, NotReady

_PACKED_ATTENTION = "zimage_packed"


@dataclass(frozen=True, slots=True)
class Run:
    """Some of a prompt's tokens after they went through the layers."""

    state: Tensor
    """What was asked for of each token, [tokens, width]."""
    keys_values: Tensor | None
    """What later tokens see of them, [layers, 2, key heads, tokens, head size]; None where nobody
    asked for that."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt to run."""

    token_ids: Sequence[int]
    blend: Blend
    """The hidden states that it asks for."""
    begun: Run | None = None
    """Its first tokens, where they ran before, for the same blend; not all."""
    is_kept: bool = False
    """Whether what later tokens see of it is asked for."""

    @property
    def rest(self) -> Sequence[int]:
        """The tokens that are still to run."""
        return self.token_ids[len(self.begun.state) :] if self.begun else self.token_ids


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
        self.layer_size = sum(weight.numel() for weight in self.layers[:1].parameters())
        linear.use_in(self.layers)
        self.norm: nn.Module = nn.Identity()
        if deepest == -1:
            self.norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        with torch.device("cpu"):  # computed and not loaded, so it must be real where it is made
            self.rotary_emb = Qwen3RotaryEmbedding(config)

    @torch.inference_mode()
    def forward(
        self, texts: Sequence[Text], is_cancelled: Callable[[], bool] = lambda: False
    ) -> list[Run]:
        """What comes of the rest of each text. Each linear runs once over the tokens of all,
        without padding; no text sees another. Raises Cancelled after the layer at which nobody
        waits any more."""
        self._refuse_unknown_tokens(texts)
        packed = _Packed(texts)
        wanted = [self._by_depth(text.blend) for text in texts]
        taken: list[Tensor | None] = [None] * len(texts)
        deepest = max(map(max, wanted))
        for depth, state in zip(range(deepest + 1), self._states(packed), strict=False):
            if is_cancelled():
                raise Cancelled("nobody waits for these prompts any more")
            rows = state.squeeze(0).split(packed.lengths)
            for index, parts in enumerate(wanted):
                if depth in parts:
                    taken[index] = _added(taken[index], rows[index], parts[depth])
        return [
            Run(whole.to(rows[0].dtype), packed.keys_values(index, max(wanted[index])))
            for index, whole in enumerate(taken)
            if whole is not None
        ]

    def linears(self) -> set[str]:
        """The names of those in the layers: nearly all of the weights, but for the table."""
        found = self.layers.named_modules(prefix="layers")
        return {name for name, module in found if isinstance(module, nn.Linear)}

    def matrices(self) -> list[str]:
        """The names of the weights that are no norms."""
        return [name for name, weight in self.named_parameters() if weight.dim() > 1]

    def _by_depth(self, blend: Blend) -> dict[int, float]:
        """The parts of a blend by how many layers come before."""
        return {self.layer_count + 1 + layer: part for layer, part in blend}

    def _refuse_unknown_tokens(self, texts: Sequence[Text]) -> None:
        """A GPU would be lost to this process after looking up one of them."""
        highest, rows = max(max(text.rest) for text in texts), self.embed_tokens.num_embeddings
        if highest >= rows:
            raise NotReady(
                f"token {highest} is not among the {rows} that the text encoder knows: "
                "the tokenizer beside it belongs to another model",
                reason="TOKENIZER_MISMATCH",
                fields={"given": str(highest), "allowed": f"0 to {rows - 1}"},
            )

    def _states(self, packed: "_Packed") -> Iterator[Tensor]:
        """The hidden states from the token table on, [1, all tokens, width], one by one."""
        device = self.embed_tokens.weight.device
        state = self.embed_tokens(packed.token_ids.to(device)).unsqueeze(0)
        rotation = self.rotary_emb(state, packed.positions.to(device).unsqueeze(0))
        yield state
        for depth, layer in enumerate(self.layers, 1):
            state = layer(state, position_embeddings=rotation, packed=packed)
            yield state if depth < self.layer_count else self.norm(state)


class _Packed:
    """The texts of one run, one after the other, and what their tokens see of each other."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.lengths = [len(text.rest) for text in texts]
        self.token_ids = torch.tensor([token for text in texts for token in text.rest])
        ends = [len(text.token_ids) for text in texts]
        spans = zip(ends, self.lengths, strict=True)
        self.positions = torch.cat([torch.arange(end - length, end) for end, length in spans])
        self._begun = [text.begun.keys_values if text.begun else None for text in texts]
        self._seen: list[list[Tensor]] = [[] for _ in texts]
        """The keys and values of each text that is kept, for each layer that ran."""
        self._kept = [index for index, text in enumerate(texts) if text.is_kept]
        self._layer = -1
        self._masks: dict[int, Tensor] = {}

    def keys_values(self, index: int, layers: int) -> Tensor | None:
        """What the tokens that ran of a text show to later ones, in so many layers."""
        if index not in self._kept:
            return None
        seen = self._seen[index][:layers]
        return torch.stack(seen) if seen else torch.empty(0, 2, 1, self.lengths[index], 1)

    def attended(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention of each text alone; all are [heads, tokens, head size]. One call per
        text keeps the fast kernel; a mask over all would leave it and cost the square of all
        tokens."""
        self._layer += 1
        queries, keys, values = (part.split(self.lengths, dim=1) for part in (query, key, value))
        for index in self._kept:
            self._seen[index].append(torch.stack((keys[index], values[index])))
        attended = []
        for index, own in enumerate(queries):
            seen_keys, seen_values, mask = self._visible(index, keys[index], values[index])
            attended.append(_attention(own, seen_keys, seen_values, mask, scale))
        return torch.cat(attended, dim=1)

    def _visible(
        self, index: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the tokens of a text see: those of its beginning as well. Without one there is no
        need for a mask."""
        begun = self._begun[index]
        if begun is None or self._layer >= len(begun):  # beyond, nobody asks for this text
            return key, value, None
        key = torch.cat((begun[self._layer, 0], key), dim=1)
        value = torch.cat((begun[self._layer, 1], value), dim=1)
        return key, value, self._mask(index, key.shape[1], key.device)

    def _mask(self, index: int, end: int, device: torch.device) -> Tensor:
        """Each of a text's last tokens sees all before it, and itself."""
        if index not in self._masks:
            places = torch.arange(end, device=device)
            self._masks[index] = places[-self.lengths[index] :, None] >= places
        return self._masks[index]


def _added(before: Tensor | None, state: Tensor, part: float) -> Tensor:
    """What a state adds to a blend, in float32; one alone is taken as it is."""
    if part == 1.0 and before is None:
        return state
    share = state.float() * part
    return share if before is None else before + share


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    if query.device.type == "mps":  # not every torch we support shares key heads there
        repeats = query.shape[0] // key.shape[0]
        key, value = (tensor.repeat_interleave(repeats, dim=0) for tensor in (key, value))
    return scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    ).squeeze(0)


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    packed: _Packed,
    scaling: float,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """From [1, heads, tokens, head size] to [1, tokens, heads, head size]."""
    attended = packed.attended(query.squeeze(0), key.squeeze(0), value.squeeze(0), scaling)
    return attended.unsqueeze(0).transpose(1, 2), None


AttentionInterface.register(_PACKED_ATTENTION, _attend)
