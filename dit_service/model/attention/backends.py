"""The ways to compute attention: full inside each sample of a packed sequence.

A backend is an argument of the call. A compiled graph sees one opaque operation, whichever backend
computes it: traced, the lengths would specialise it to every batch.
Shapes: T packed tokens, H heads, E the width of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dit_service.model.attention import packages, sdpa
from dit_service.model.attention.backend import Backend
from dit_service.model.layout import Segments

BACKENDS: Mapping[str, Backend] = {
    "sdpa": sdpa.SDPA,
    "sdpa_cudnn": sdpa.CUDNN,
    "torch_varlen": packages.TORCH_VARLEN,
    "flash_attn_3": packages.FLASH_ATTN_3,
    "flash_attn_2": packages.FLASH_ATTN_2,
    "xformers": packages.XFORMERS,
    "sage": packages.SAGE,
}
"""By the names that settings and numeric plans use."""


def attend(backend: str, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments) -> Tensor:
    """What each token gets of all tokens of its own sample."""
    if torch.compiler.is_compiling():
        attended_THE: Tensor = _opaque(
            q_THE, k_THE, v_THE, segments.bounds, segments.device_bounds, backend
        )
        return attended_THE
    return BACKENDS[backend].attend(q_THE, k_THE, v_THE, segments.lengths, segments.device_bounds)


@torch.library.custom_op("zimage::attend", mutates_args=())
def _opaque(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, bounds: Tensor, device_bounds: Tensor, backend: str
) -> Tensor:
    lengths = bounds.diff().tolist()
    return BACKENDS[backend].attend(q_THE, k_THE, v_THE, lengths, device_bounds).contiguous()


@_opaque.register_fake
def _(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, bounds: Tensor, device_bounds: Tensor, backend: str
) -> Tensor:
    return torch.empty_like(q_THE, memory_format=torch.contiguous_format)
