"""Embeddings of more rows than the DiT takes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, cosine_similarity, interpolate

from encoder_service.compression import compressed
from zimage_core.embeddings import ATTENTION_POOL, INTERPOLATE, POOL
from zimage_core.tensors import TensorData

SHAPES = [(5, 3), (6, 3), (1600, 1504), (4096, 1504), (33, 32), (9, 1), (2, 1)]
"""Rows before and after."""


def _data(tensor: Tensor) -> TensorData:
    name = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return TensorData(name, tuple(tensor.shape), raw)


def _tensor(data: TensorData) -> Tensor:
    values = torch.frombuffer(bytearray(data.data), dtype=getattr(torch, data.element_type))
    return values.view(data.shape)


def _rows(count: int, width: int = 7) -> Tensor:
    """With a first row like that of real weights, hundreds of times as large as the others."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    rows[0] *= 1e3
    return rows


def _by_attention(rows: Tensor, count: int) -> Tensor:
    """As the definition says it, row by row."""
    total = len(rows)
    rarity = []
    for j in range(total):
        near = [k for k in (j - 2, j - 1, j + 1, j + 2) if 0 <= k < total]
        rarity.append(
            1 - torch.stack([cosine_similarity(rows[j], rows[k], 0) for k in near]).mean()
        )
    regions: list[list[int]] = [[] for _ in range(count)]
    for j in range(total):
        regions[min(j * count // total, count - 1)].append(j)
    pooled = []
    for region in regions:
        weights = torch.stack([rarity[j] for j in region]).softmax(0)
        pooled.append((weights[:, None] * rows[region]).sum(0))
    return torch.stack(pooled)


@pytest.mark.parametrize(("mode", "expected"), [(INTERPOLATE, [0, 2, 4]), (POOL, [0.5, 2, 3.5])])
def test_five_rows_to_three(mode: str, expected: list[float]) -> None:
    rows = torch.arange(5.0)[:, None]
    assert _tensor(compressed(_data(rows), 3, mode)).flatten().tolist() == expected


@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_interpolation_is_that_of_aligned_corners(before: int, after: int) -> None:
    rows = _rows(before)
    found = _tensor(compressed(_data(rows), after, INTERPOLATE))
    exact = rows.double().T[None]  # in float32 its places are off
    expected = interpolate(exact, size=after, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-4)
    assert torch.equal(found[0], rows[0])
    assert after == 1 or torch.equal(found[-1], rows[-1])


@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_pools_are_adaptive_means(before: int, after: int) -> None:
    rows = _rows(before)
    found = _tensor(compressed(_data(rows), after, POOL))
    torch.testing.assert_close(found, adaptive_avg_pool1d(rows.T[None], after)[0].T)


@pytest.mark.parametrize(("before", "after"), [(5, 3), (40, 32), (33, 32), (9, 1), (2, 1)])
def test_rows_unlike_their_neighbours_count_more(before: int, after: int) -> None:
    rows = _rows(before)
    found = _tensor(compressed(_data(rows), after, ATTENTION_POOL))
    torch.testing.assert_close(found, _by_attention(rows, after), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [INTERPOLATE, POOL, ATTENTION_POOL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_in_float32_whatever_it_is_stored_in(mode: str, dtype: torch.dtype) -> None:
    rows = _rows(40).to(dtype)
    found = _tensor(compressed(_data(rows), 32, mode))
    exact = _tensor(compressed(_data(rows.float()), 32, mode))
    assert torch.equal(found, exact.to(dtype))


def test_what_fits_stays_as_it_is() -> None:
    data = _data(_rows(32))
    assert compressed(data, 32, INTERPOLATE) is data


def test_a_row_of_zeros_is_like_no_other() -> None:
    found = _tensor(compressed(_data(torch.zeros(9, 4)), 3, ATTENTION_POOL))
    assert np.array_equal(found.numpy(), np.zeros((3, 4)))
