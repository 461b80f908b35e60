"""Full attention inside each sample of a packed sequence; the backend is an argument of the call.

Shapes: T packed tokens, S samples, L tokens of one, H heads, E the width of a head.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dit_service.model.layout import Segments

AttentionBackend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def sdpa(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments) -> Tensor:
    """torch's own attention, on every device.

    A compiled graph sees one opaque operation: traced, the lengths would specialise it to every
    batch.
    """
    if torch.compiler.is_compiling():
        attended_THE: Tensor = _opaque_sdpa(q_THE, k_THE, v_THE, segments.bounds)
        return attended_THE
    return _sdpa(q_THE, k_THE, v_THE, segments.lengths)


BACKENDS: dict[str, AttentionBackend] = {"sdpa": sdpa}
"""The attention backends by the names that settings and numeric plans use."""


def _sdpa(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, lengths: Sequence[int]) -> Tensor:
    if len(set(lengths)) == 1:
        return _equal_sdpa(q_THE, k_THE, v_THE, len(lengths))
    samples = zip(*(x_THE.split(list(lengths)) for x_THE in (q_THE, k_THE, v_THE)), strict=True)
    return torch.cat([_equal_sdpa(q_LHE, k_LHE, v_LHE, 1) for q_LHE, k_LHE, v_LHE in samples])


def _equal_sdpa(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, samples: int) -> Tensor:
    q_SHLE, k_SHLE, v_SHLE = (
        x_THE.unflatten(0, (samples, -1)).transpose(1, 2) for x_THE in (q_THE, k_THE, v_THE)
    )
    return (
        functional.scaled_dot_product_attention(q_SHLE, k_SHLE, v_SHLE)
        .transpose(1, 2)
        .flatten(0, 1)
    )


@torch.library.custom_op("zimage::sdpa", mutates_args=())
def _opaque_sdpa(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, bounds: Tensor) -> Tensor:
    return _sdpa(q_THE, k_THE, v_THE, bounds.diff().tolist()).contiguous()


@_opaque_sdpa.register_fake
def _(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty_like(q_THE, memory_format=torch.contiguous_format)
