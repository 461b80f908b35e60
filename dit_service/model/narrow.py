"""Linears whose weights take a byte each, eight-bit floats or integers, each output's scaled; or
half of one, the nearest of sixteen levels, of which each few have a scale.

Only the large linears of the blocks become narrow. Embedders, norms, modulation and the final layer
are small, and pictures are sensitive to them.
Shapes: T packed tokens, I a linear's inputs, O its outputs.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import ScalingType, scaled_mm

from dit_service.model.attention.backend import Place
from zimage_core.planning.memory import FOUR_BITS, FULL, GROUP

AS_STORED, MULTIPLIED = "auto", "fp8_matmul"
NARROW = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    MULTIPLIED: torch.float8_e4m3fn,
    FOUR_BITS: torch.uint8,
}
FORMS = (FULL, *NARROW)
"""Weights in the type that the model computes in; narrow, and widened to it whenever they are used;
or multiplied as they are, with inputs that are made narrow, too."""

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
        if torch.is_grad_enabled() and x_TI.requires_grad:
            through: Tensor = _Through.apply(x_TI, self.weight, self.scale_O1)  # type: ignore[no-untyped-call]
            return through
        return functional.linear(x_TI, widened(self.weight, self.scale_O1, x_TI.dtype))


class _Through(torch.autograd.Function):
    """Keeps the narrow weights for the gradient rather than the wide ones."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, scale: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(weight_OI, scale)
        return functional.linear(x_TI, widened(weight_OI, scale, x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor, None, None]:
        """Of the input alone: the weights are frozen."""
        weight_OI, scale = ctx.saved_tensors
        return gradient_TO @ widened(weight_OI, scale, gradient_TO.dtype), None, None


def obstacle(form: str, place: Place) -> str:
    """Why weights cannot be in that form there; empty when they may."""
    if form in (FULL, "int8", FOUR_BITS) or place.device.type == "cpu":
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


def full_shape(weight: Tensor) -> tuple[int, ...]:
    """The sizes that a weight has in a file, of which two values may be in a byte here."""
    *rows, last = weight.shape
    return (*rows, 2 * last if weight.dtype == NARROW[FOUR_BITS] else last)


def widened(weight_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What narrow weights stand for, rounded once, as if loaded so."""
    if weight_OI.dtype == NARROW[FOUR_BITS]:
        levels = torch.tensor(LEVELS, device=weight_OI.device)
        halves_OI2 = torch.stack((weight_OI & 15, weight_OI >> 4), dim=-1)
        groups_OGN = levels[halves_OI2.int()].view(*scale.shape, -1)
        return groups_OGN.mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)
    return weight_OI.float().mul_(scale).to(dtype)


def narrowed(values_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A byte for each value, and the scale of each row; or two values in a byte, and the scale of
    each group of a row. Where the bytes are floats, scales are powers of two: values that came from
    such bytes stay what they are."""
    wide_OI = values_OI.float()
    if dtype == NARROW[FOUR_BITS]:
        return _nearest_levels(wide_OI)
    largest_O1 = wide_OI.abs().amax(1, keepdim=True).clamp(min=_SMALLEST)
    if dtype.is_floating_point:
        scale_O1 = _power_of_two(largest_O1)
        return (wide_OI / scale_O1).to(dtype), scale_O1
    scale_O1 = largest_O1 / _LARGEST_INTEGER
    return (wide_OI / scale_O1).round().to(dtype), scale_O1


def _nearest_levels(wide_OI: Tensor) -> tuple[Tensor, Tensor]:
    group = math.gcd(GROUP, wide_OI.shape[1])
    groups_OGN = wide_OI.unflatten(1, (-1, group))
    scale_OG = groups_OGN.abs().amax(2).clamp(min=_SMALLEST)
    shares_OI = (groups_OGN / scale_OG.unsqueeze(-1)).flatten(1)
    levels = torch.tensor(LEVELS, device=wide_OI.device)
    numbers_OI = torch.bucketize(shares_OI, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return numbers_OI[:, ::2] | numbers_OI[:, 1::2] << 4, scale_OG


def _levels() -> list[float]:
    """Those of NF4 (Dettmers and others, "QLoRA", 2023): about as often as each other among values
    that are normally distributed; 0 and both ends are among them."""
    normal, end = NormalDist(), 0.9677083
    above = [normal.inv_cdf(end - (end - 0.5) * step / 8) for step in range(8)]
    below = [-normal.inv_cdf(end - (end - 0.5) * step / 7) for step in range(7)]
    return [level / above[0] for level in sorted([*below, 0.0, *above])]


LEVELS = _levels()


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
