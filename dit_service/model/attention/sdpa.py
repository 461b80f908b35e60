"""PyTorch's own attention, on every device: samples of one length in one call, else one by one.

Shapes: T packed tokens, S samples, L tokens of one, H heads, E the width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_service.model.attention.backend import HALVES, Backend


def _usual(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], _bounds: Tensor
) -> Tensor:
    if len(set(lengths)) == 1:
        return _equal(q_THE, k_THE, v_THE, len(lengths))
    samples = zip(*(x_THE.split(list(lengths)) for x_THE in (q_THE, k_THE, v_THE)), strict=True)
    return torch.cat([_equal(q_LHE, k_LHE, v_LHE, 1) for q_LHE, k_LHE, v_LHE in samples])


def _cudnn(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int], bounds: Tensor
) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return _usual(q_THE, k_THE, v_THE, lengths, bounds)


def _equal(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, samples: int) -> Tensor:
    q_SHLE, k_SHLE, v_SHLE = (
        x_THE.unflatten(0, (samples, -1)).transpose(1, 2) for x_THE in (q_THE, k_THE, v_THE)
    )
    return (
        functional.scaled_dot_product_attention(q_SHLE, k_SHLE, v_SHLE)
        .transpose(1, 2)
        .flatten(0, 1)
    )


SDPA = Backend(_usual, max_head_dim=1 << 16, head_dim_multiple=1)
CUDNN = Backend(_cudnn, capabilities=((8, 0), (99, 0)), dtypes=HALVES, max_head_dim=128)
