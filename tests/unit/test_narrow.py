"""Weights of a byte each: what they lose, and what they must not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dit_service.engine.notes import Notes
from dit_service.engine.precision import Forms, Precision, Trial
from dit_service.model.attention.backend import Place
from dit_service.model.narrow import LEVELS, NARROW, NarrowLinear, narrowed, obstacle, widened
from zimage_core.errors import InvalidSettings

CPU = Place.of(torch.device("cpu"), torch.bfloat16, 32)
ERROR = {"int8": 0.01, "fp8": 0.03, "fp8_matmul": 0.045, "nf4": 0.1}
"""Of the length of the outputs, for random values."""


def _linear(form: str, weight_OI: Tensor) -> nn.Module:
    linear = nn.Linear(*reversed(weight_OI.shape), bias=False)
    linear.weight = nn.Parameter(weight_OI)
    return NarrowLinear(linear, form)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("form", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_near_those_of_full_weights(form: str, dtype: torch.dtype) -> None:
    weight_OI, x_TI = _drawn(96, 64) * torch.logspace(-4, 2, 96).unsqueeze(1), _drawn(33, 64)
    exact_TO = x_TI @ weight_OI.T
    ours_TO = _linear(form, weight_OI)(x_TI.to(dtype)).float()
    error_O = (ours_TO - exact_TO).norm(dim=0) / exact_TO.norm(dim=0)
    assert error_O.mean() <= ERROR[form]
    assert error_O.max() <= 2 * ERROR[form], "large rows cost small ones nothing"
    assert ours_TO.shape == exact_TO.shape


@pytest.mark.parametrize("form", ["int8", "fp8", "nf4"])
def test_gradients_are_those_of_what_the_weights_stand_for(form: str) -> None:
    narrow, x_TI = _linear(form, _drawn(96, 64)), _drawn(33, 64).requires_grad_()
    narrow(x_TI).square().sum().backward()
    wide_OI = widened(narrow.weight, narrow.scale_O1, torch.float32)
    other_TI = x_TI.detach().clone().requires_grad_()
    (other_TI @ wide_OI.T).square().sum().backward()
    assert torch.equal(narrow(x_TI), (x_TI @ wide_OI.T))
    assert torch.allclose(x_TI.grad, other_TI.grad, rtol=1e-5, atol=1e-4)
    kept = narrow(x_TI).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert sum(one.nbytes for one in kept) < wide_OI.nbytes / 3


def test_levels_are_kept_as_they_are() -> None:
    scales_O1 = torch.logspace(-2, 2, 5).unsqueeze(1)
    values_OI = torch.tensor(LEVELS).repeat(5, 8) * scales_O1
    weight_OI, scale_OG = narrowed(values_OI, torch.uint8)
    assert weight_OI.nbytes == values_OI.numel() // 2
    assert torch.allclose(widened(weight_OI, scale_OG, torch.float32), values_OI)
    assert (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1.0, 0.0, 1.0)
    assert abs(LEVELS[8] - 0.0795803) < 1e-5  # as published


def test_one_large_token_costs_the_others_nothing() -> None:
    weight_OI, x_TI = _drawn(96, 64), _drawn(33, 64)
    linear = _linear("fp8_matmul", weight_OI)
    alone_TO = linear(x_TI)
    x_TI[7] *= 1e6
    assert torch.equal(linear(x_TI)[8:], alone_TO[8:])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_that_were_narrow_stay_what_they_are(dtype: torch.dtype) -> None:
    values_OI = (_drawn(40, 64) * torch.logspace(-2, 1, 40).unsqueeze(1)).to(dtype).float()
    weight_OI, scale_O1 = narrowed(values_OI, torch.float8_e4m3fn)
    kept_OI = weight_OI.float() * scale_O1
    tiny_O1 = values_OI.abs().amax(1, keepdim=True) * 2**-14  # beyond what eight bits span
    assert torch.equal(
        kept_OI.where(values_OI.abs() > tiny_O1, 0), values_OI.where(values_OI.abs() > tiny_O1, 0)
    )


def test_rows_of_zeros_stay_zeros() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        weight_OI, scale_O1 = narrowed(torch.zeros(3, 16), dtype)
        assert not (weight_OI.float() * scale_O1).any()


@pytest.mark.parametrize(
    ("form", "device", "capability", "dtype", "why"),
    [
        ("fp8", "mps", (0, 0), torch.bfloat16, "MPS"),
        ("fp8_matmul", "cuda", (8, 6), torch.bfloat16, "8.9"),
        ("fp8_matmul", "cuda", (9, 0), torch.float16, "bfloat16"),
        ("fp8_matmul", "cuda", (9, 0), torch.bfloat16, ""),
        ("fp8", "cuda", (7, 5), torch.float16, ""),
        ("int8", "mps", (0, 0), torch.bfloat16, ""),
    ],
)
def test_where_a_form_works(
    form: str, device: str, capability: tuple[int, int], dtype: torch.dtype, why: str
) -> None:
    told = obstacle(form, Place(torch.device(device), capability, dtype, 128))
    assert why in told
    assert bool(told) == bool(why)


class _Trials:
    """What forms draw: so far from the file's, and so fast."""

    def __init__(self, error: float, seconds: float) -> None:
        self.error, self.seconds = error, seconds
        self.tried: list[str] = []

    def __call__(self, form: str) -> Trial:
        self.tried.append(form)
        latents_CHW, picture_HW3 = _drawn(4, 8, 8), torch.full((8, 8, 3), 100.0)
        if form == "full":
            return Trial((latents_CHW,), (picture_HW3,), 1.0)
        wrong_CHW = latents_CHW + self.error * _drawn(4, 8, 8).flip(0)
        return Trial((wrong_CHW,), (picture_HW3 + 100 * self.error,), self.seconds)


def _choose(trials: _Trials, wanted: str, folder: Path, *, is_checked: bool = True) -> Precision:
    forms = Forms("full", CPU, trials, Notes("weights.json", folder), "a file")
    return forms.choose(wanted, is_checked=is_checked)


def test_a_form_that_draws_other_pictures_is_refused_and_not_tried_again(tmp_path: Path) -> None:
    trials = _Trials(error=0.2, seconds=0.5)
    for _ in range(2):
        with pytest.raises(InvalidSettings, match=r"weights int8: .*cosine 0\.98.*dB"):
            _choose(trials, "int8", tmp_path)
    assert trials.tried == ["int8", "full"]
    assert _choose(trials, "fastest", tmp_path).form == "full"
    assert _choose(trials, "int8", tmp_path, is_checked=False).form == "int8"


def test_a_form_that_draws_the_same_is_used_and_the_fastest_if_it_is(tmp_path: Path) -> None:
    trials = _Trials(error=0.01, seconds=0.5)
    assert _choose(trials, "fp8", tmp_path).form == "fp8"
    fastest = _choose(trials, "fastest", tmp_path)
    assert fastest.form == "fp8_matmul"
    assert "2.00 times as fast" in fastest.reason
    slow = _Trials(error=0.01, seconds=1.5)
    assert _choose(slow, "fastest", tmp_path / "slow").form == "full"


def test_what_loses_nothing_is_not_tried(tmp_path: Path) -> None:
    trials = _Trials(error=1.0, seconds=1.0)
    assert _choose(trials, "auto", tmp_path).form == "full"
    assert _choose(trials, "full", tmp_path).form == "full"
    assert not trials.tried
    with pytest.raises(InvalidSettings, match="allowed are auto, full"):
        _choose(trials, "fp4", tmp_path)
