"""Linears whose weights take a byte each: eight-bit floats or integers, each output's scaled.

Only the large linears of the blocks become narrow. Embedders, norms, modulation and the final layer
are small, and pictures are sensitive to them.
Shapes: T packed tokens, I a linear's inputs, O its outputs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import ScalingType, scaled_mm

from dit_service.model.attention.backend import Place

AS_STORED, FULL, MULTIPLIED = "auto", "full", "fp8_matmul"
NARROW = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, MULTIPLIED: torch.float8_e4m3fn}
FORMS = (FULL, *NARROW)
"""Weights in the type that the model computes in; a byte each, widened to it whenever they are
used; or multiplied as they are, with inputs that are made narrow, too."""

SCALE = "scale_O1"

_FIRST_TO_MULTIPLY = (8, 9)
_LARGEST_FLOAT, _LARGEST_INTEGER = 448.0, 127.0
_SMALLEST = 1e-12


class NarrowLinear(nn.Module):
    """A linear without bias."""

    def __init__(self, linear: nn.Linear, form: str) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale_O1: Tensor
        weight_OI, scale_O1 = narrowed(linear.weight.detach(), NARROW[form])
        self.register_buffer("weight", weight_OI)
        self.register_buffer(SCALE, scale_O1)
        self._is_multiplied = form == MULTIPLIED

    def forward(self, x_TI: Tensor) -> Tensor:
        """The product with the weights that the bytes stand for."""
        if self._is_multiplied:
            return _multiplied(x_TI, self.weight, self.scale_O1)
        weight_OI = self.weight.float().mul_(self.scale_O1)  # rounded once, as if loaded so
        return functional.linear(x_TI, weight_OI.to(x_TI.dtype))


def obstacle(form: str, place: Place) -> str:
    """Why weights cannot be in that form there; empty when they may."""
    if form in (FULL, "int8") or place.device.type == "cpu":
        return ""
    if place.device.type == "mps":
        return "there are no eight-bit floats on MPS"
    if form == MULTIPLIED and place.capability < _FIRST_TO_MULTIPLY:
        return "only an NVIDIA GPU from compute capability 8.9 on multiplies eight-bit floats"
    if form == MULTIPLIED and place.dtype != torch.bfloat16:
        return "eight-bit floats are multiplied beside bfloat16 alone"
    return ""


def make_narrow(block: nn.Module, names: Iterable[str], form: str) -> None:
    """Puts narrow linears where the linears of those names are."""
    for name in names:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        block.set_submodule(name, NarrowLinear(linear, form))


def narrowed(values_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A byte for each value, and the scale of each row. Where the bytes are floats, scales are
    powers of two: values that came from such bytes stay what they are."""
    wide_OI = values_OI.float()
    largest_O1 = wide_OI.abs().amax(1, keepdim=True).clamp(min=_SMALLEST)
    if dtype.is_floating_point:
        scale_O1 = _power_of_two(largest_O1)
        return (wide_OI / scale_O1).to(dtype), scale_O1
    scale_O1 = largest_O1 / _LARGEST_INTEGER
    return (wide_OI / scale_O1).round().to(dtype), scale_O1


def _multiplied(x_TI: Tensor, weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Each token has a scale of its own, so that one large value costs its neighbours nothing."""
    largest_T1 = x_TI.abs().amax(1, keepdim=True).float().clamp(min=_SMALLEST)
    scale_T1 = _power_of_two(largest_T1)
    return scaled_mm(
        (x_TI / scale_T1.to(x_TI.dtype)).to(weight_OI.dtype),
        weight_OI.T,
        scale_T1,
        ScalingType.RowWise,
        scale_O1.T,
        ScalingType.RowWise,
        output_dtype=x_TI.dtype,
    )


def _power_of_two(largest: Tensor) -> Tensor:
    """By which the largest of some values becomes one that an eight-bit float can hold."""
    return (largest / _LARGEST_FLOAT).log2().ceil().exp2()
