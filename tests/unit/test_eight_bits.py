"""Embeddings in eight bits: torch's own rounding, by rows."""

import pytest
import torch
from safetensors.torch import load

from zimage_core.formats import eight_bits
from zimage_core.tensors import TensorData


def _rows() -> torch.Tensor:
    """Small and large ones, one with an outlier, one of nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 512, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    rows[2, 3] = 9000.0
    rows[4] = 0
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    rows = _rows().to(dtype)
    data = rows.contiguous().view(torch.uint8).numpy().tobytes()
    name = str(dtype).removeprefix("torch.")
    found = load(eight_bits.file(TensorData(name, tuple(rows.shape), data)))
    codes, scales = found[eight_bits.TENSOR], found[eight_bits.SCALE]
    expected = (rows.bfloat16().float() / scales).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    apart = (codes.float() * scales - rows.float()).norm(dim=1) / rows.float().norm(dim=1)
    assert torch.nan_to_num(apart).max() < 0.04
    assert codes[4].float().abs().max() == 0
