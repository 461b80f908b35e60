"""The calls of attention packages, with the signatures of named releases, computed on the CPU.

They refuse what the real ones refuse of layout, type and bounds, and compute nothing but what those
compute; a call that fits them fits the kernels.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional


def attended(q: Tensor, k: Tensor, v: Tensor, bounds: Iterable[int], scale: float) -> Tensor:
    """Sample by sample, in float32, for [tokens, heads, width]."""
    parts = []
    for begin, end in pairwise(bounds):
        qkv = (x[begin:end].transpose(0, 1).float() for x in (q, k, v))
        parts.append(functional.scaled_dot_product_attention(*qkv, scale=scale).transpose(0, 1))
    return torch.cat(parts).to(q.dtype)


def _varlen(
    qkv: Sequence[Tensor], bounds: Sequence[Tensor], longest: Sequence[int], scale: float | None
) -> Tensor:
    q, k, v = qkv
    for x in qkv:
        assert x.ndim == 3, "packed samples are [tokens, heads, width]"
        assert x.dtype in (torch.float16, torch.bfloat16), "flash attention takes halves alone"
        assert x.shape == q.shape
        assert x.stride(-1) == 1
    for bound, most in zip(bounds, longest, strict=True):
        assert bound.dtype == torch.int32
        assert bound.device == q.device
        assert bound.is_contiguous()
        assert (bound[0], bound[-1]) == (0, len(q))
        assert most == bound.diff().max()
    return attended(q, k, v, bounds[0].tolist(), scale or 1 / math.sqrt(q.shape[-1]))


def flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash-attention v2.8.3, flash_attn/flash_attn_interface.py:1370, flash_attn_varlen_func."""
    assert not any((dropout_p, causal, softcap, return_attn_probs))
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _varlen((q, k, v), bounds, longest, softmax_scale)


def flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """flash-attention v2.8.3, hopper/flash_attn_interface.py:581, flash_attn_varlen_func."""
    assert not any((causal, softcap, attention_chunk))
    assert seqused_q is seqused_k is qv is None
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _varlen((q, k, v), bounds, longest, softmax_scale)


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """torch 2.13.0, torch/nn/attention/varlen.py:176, varlen_attn."""
    assert cu_seq_k is not None
    assert window_size == (-1, -1)
    return _varlen((query, key, value), (cu_seq_q, cu_seq_k), (max_q, max_k), scale)


def sage_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    """SageAttention 2.2.0 (d1a57a5), sageattention/core.py:334, sageattn_varlen."""
    assert not is_causal
    assert not kwargs
    bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _varlen((q, k, v), bounds, longest, sm_scale)


def sage(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Tensor:
    """SageAttention 2.2.0 (d1a57a5), sageattention/core.py:79, sageattn."""
    assert not any((is_causal, return_lse, kwargs))
    assert q.ndim == 4
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    samples, tokens = q.shape[:2]
    bounds = range(0, samples * tokens + 1, tokens)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = attended(*flat, bounds, sm_scale or 1 / math.sqrt(q.shape[-1])).view(q.shape)
    return out.transpose(1, 2) if tensor_layout == "HND" else out


class BlockDiagonalMask:
    """xformers v0.0.33, xformers/ops/fmha/attn_bias.py:753."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> "BlockDiagonalMask":
        """attn_bias.py:849."""
        assert kv_seqlen is None
        return cls(q_seqlen)


def xformers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: BlockDiagonalMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """xformers v0.0.33, xformers/ops/fmha/__init__.py:199, memory_efficient_attention."""
    assert attn_bias is not None
    assert p == 0.0
    assert query.shape[0] == 1, "with such a mask the samples stand in a batch of one"
    assert attn_bias.bounds[-1] == query.shape[1]
    qkv = (x.squeeze(0) for x in (query, key, value))
    return attended(*qkv, attn_bias.bounds, scale or 1 / math.sqrt(query.shape[-1])).unsqueeze(0)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them where the packages would be."""
    for name, content in {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_2},
        "flash_attn_interface": {"flash_attn_varlen_func": flash_attn_3},
        "sageattention": {"sageattn": sage, "sageattn_varlen": sage_varlen},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": xformers},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }.items():
        module = ModuleType(name)
        module.__spec__ = torch.__spec__  # found, so installed
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
