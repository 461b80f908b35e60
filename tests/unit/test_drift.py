"""The arithmetic of drift, beside torch's."""

from pathlib import Path

import pytest
import torch

from zimage_core.drift import least_cosine
from zimage_core.embeddings import Numerics
from zimage_core.errors import InvalidSettings
from zimage_core.formats import drift_file
from zimage_core.formats.drift_file import Drift
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


def test_a_file_has_the_last_measurement_of_each(tmp_path: Path) -> None:
    path = tmp_path / "drifts.json"

    def measured(weights: str, cosine: float) -> Drift:
        numerics = Numerics("bfloat16", "bfloat16", "engine", "cpu", weights)
        return Drift(
            pinned="a", identity="b", numerics=numerics, worst_cosine=cosine, mean_cosine=1.0
        )

    for drift in (measured("full", 0.9), measured("int4", 0.8), measured("full", 0.95)):
        drift_file.add(path, drift)
    found = {drift.numerics.weights: drift.worst_cosine for drift in drift_file.read(path)}
    assert found == {"full": 0.95, "int4": 0.8}


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2, "drifts": []}', '{"drifts": [1]}'])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "drifts.json"
    path.write_text(content)
    with pytest.raises(InvalidSettings, match=r"drifts\.json: no file of"):
        drift_file.read(path)
