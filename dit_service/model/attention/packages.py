"""Kernels that take packed samples as they are. Each package is imported when its kernel is used.

Shapes: T packed tokens, H heads, E the width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_service.model.attention.backend import HALVES, Backend

_ANY_LATER = (99, 0)


def _flash_attn_3(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], bounds: Tensor
) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    longest = max(lengths)
    attended = flash_attn_varlen_func(q_THE, k_THE, v_THE, bounds, bounds, longest, longest)
    # Until 2.7 it gave the sums of the exponentials, too.
    attended_THE: Tensor = attended[0] if isinstance(attended, tuple) else attended
    return attended_THE


def _flash_attn_2(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], bounds: Tensor
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(lengths)
    attended_THE: Tensor = flash_attn_varlen_func(
        q_THE, k_THE, v_THE, bounds, bounds, longest, longest
    )
    return attended_THE


def _torch_varlen(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], bounds: Tensor
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths)
    attended_THE = varlen_attn(q_THE, k_THE, v_THE, bounds, bounds, longest, longest)
    assert isinstance(attended_THE, Tensor)
    return attended_THE


def _xformers(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], _bounds: Tensor
) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths), device=q_THE.device)
    one = (x_THE.unsqueeze(0) for x_THE in (q_THE, k_THE, v_THE))
    attended_THE: Tensor = memory_efficient_attention(*one, attn_bias=mask).squeeze(0)
    return attended_THE


def _sage(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], bounds: Tensor
) -> Tensor:
    """One sample takes the kernel that is made for the architecture, several one in Triton."""
    from sageattention import sageattn, sageattn_varlen

    if len(lengths) == 1:
        one = (x_THE.unsqueeze(0) for x_THE in (q_THE, k_THE, v_THE))
        alone_THE: Tensor = sageattn(*one, tensor_layout="NHD").squeeze(0)
        return alone_THE
    longest = max(lengths)
    attended_THE: Tensor = sageattn_varlen(q_THE, k_THE, v_THE, bounds, bounds, longest, longest)
    return attended_THE


FLASH_ATTN_3 = Backend(
    _flash_attn_3, "flash_attn_interface", capabilities=((9, 0), (10, 0)), dtypes=HALVES
)
FLASH_ATTN_2 = Backend(
    _flash_attn_2, "flash_attn", capabilities=((8, 0), _ANY_LATER), dtypes=HALVES
)
TORCH_VARLEN = Backend(_torch_varlen, capabilities=((8, 0), _ANY_LATER), dtypes=HALVES)
XFORMERS = Backend(
    _xformers,
    "xformers",
    capabilities=((7, 0), _ANY_LATER),
    dtypes=(*HALVES, torch.float32),
)
SAGE = Backend(
    _sage,
    "sageattention",
    capabilities=((8, 0), _ANY_LATER),
    dtypes=HALVES,
    max_head_dim=128,
    is_lossy=True,
)
