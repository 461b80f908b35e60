"""The arithmetic of drift, beside torch's."""

import pytest
import torch

from zimage_core.drift import least_cosine
from zimage_core.tensors import TensorData


def _data(values: torch.Tensor, kind: torch.dtype) -> TensorData:
    stored = values.to(kind)
    name = str(kind).removeprefix("torch.")
    return TensorData(name, tuple(values.shape), stored.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_cosine_of_the_worst_token_but_the_first(kind: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(0)
    one = torch.randn(6, 32, generator=chance)
    other = one + 0.1 * torch.randn(6, 32, generator=chance)
    other[0] = -one[0]
    cosines = torch.cosine_similarity(one, other.to(kind).float(), dim=1)
    found = least_cosine(_data(one, torch.float32), _data(other, kind))
    assert found == pytest.approx(float(cosines[1:].min()), abs=1e-6)


def test_one_token_says_nothing() -> None:
    assert least_cosine(*2 * [_data(torch.zeros(1, 4), torch.float32)]) == 1.0
