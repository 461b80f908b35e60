"""Linears whose weights take a byte each, or half of one.

Bytes are eight-bit integers with a scale for each output. A CPU that multiplies such integers four
at a time does so faster than bfloat16: what comes in becomes integers as well, each token by its
own scale, because the first token of a prompt is a thousand times as large as the rest. One byte a
number loses as much as the weights do. Two bytes, one for what the first leaves, lose nothing that
bfloat16 would not, and are two rows in the same product.

Elsewhere weights are widened whenever they are used. Half bytes have a scale and a smallest value
for each group of a row.
Shapes: T tokens, I a linear's inputs, O its outputs, G its groups.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

FULL, INT8, INT8_DYNAMIC, INT4 = "full", "int8", "int8_dynamic", "int4"
"""As the model computes; integers; integers times integers of a byte; half bytes."""

_LARGEST, _ZERO, _SECOND = 127.0, 128, 254.0
_SMALLEST = 1e-12
_TOKENS_AT_ONCE = 512
"""More only take memory."""
_GROUP, _LEVELS, _PACKED_BY = 64, 15.0, 16
_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
_FIRST_GPU = (7, 5)
_FEWEST_ROWS, _ROWS_BY = 17, 8
"""What an NVIDIA GPU's integer product takes."""


def obstacle(form: str, device: torch.device) -> str:
    """Why weights cannot be in that form there; empty where they may."""
    if form != INT8_DYNAMIC:
        return ""
    if device.type == "cuda":
        fits = not torch.version.hip and torch.cuda.get_device_capability(device) >= _FIRST_GPU
        return "" if fits else "only NVIDIA GPUs from compute capability 7.5 on multiply them"
    if device.type == "mps":
        return "MPS multiplies no eight-bit integers"
    if not _multiplies_integers():
        return "this CPU has no instructions for products of eight-bit integers (VNNI)"
    return ""


def linear(weight_OI: Tensor, form: str, device: torch.device) -> nn.Module:
    """One with these weights, where they are, for inputs of their type; it will run on `device`."""
    is_cpu = device.type == "cpu"
    if form == INT4:
        if weight_OI.shape[1] % _GROUP:
            return linear(weight_OI, INT8, device)
        is_packed = is_cpu and weight_OI.shape[0] % _PACKED_BY == 0
        return PackedHalves(weight_OI) if is_packed else WidenedHalves(weight_OI)
    if is_cpu and _multiplies_integers():
        return Integers(weight_OI, is_dynamic=form == INT8_DYNAMIC)
    return CudaIntegers(weight_OI) if form == INT8_DYNAMIC else WidenedIntegers(weight_OI)


class Integers(nn.Module):
    """On a CPU with instructions for it; oneDNN lays the weights out."""

    def __init__(self, weight_OI: Tensor, *, is_dynamic: bool) -> None:
        super().__init__()
        values_OI, scale_O1 = _rounded(weight_OI)
        self._packed = torch.ops.onednn.qlinear_prepack(values_OI, None)
        self._scale_O = scale_O1.flatten()
        self._zeros_O = torch.zeros(len(weight_OI), dtype=torch.int64)
        self._is_dynamic = is_dynamic

    def forward(self, x_1TI: Tensor) -> Tensor:
        """The product, [1, T, O]."""
        parts = [self._product(part_TI) for part_TI in x_1TI[0].split(_TOKENS_AT_ONCE)]
        return torch.cat(parts).unsqueeze(0)

    def _product(self, x_TI: Tensor) -> Tensor:
        wide_TI = x_TI.float()
        scale_T1 = _scale(wide_TI)
        share_TI = wide_TI / scale_T1
        first_TI = share_TI.round()
        if self._is_dynamic:
            product_TO = self._times(first_TI)
        else:
            second_TI = share_TI.sub_(first_TI).mul_(_SECOND).round_()
            both_TO = self._times(torch.cat((first_TI, second_TI)))
            product_TO, rest_TO = both_TO.chunk(2)
            product_TO.add_(rest_TO, alpha=1 / _SECOND)
        return product_TO.mul_(scale_T1).to(x_TI.dtype)

    def _times(self, whole_TI: Tensor) -> Tensor:
        """Of whole numbers. They go in above zero: not every CPU has instructions for others."""
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole_TI.add_(_ZERO).to(torch.uint8),
            1.0,
            _ZERO,
            self._packed,
            self._scale_O,
            self._zeros_O,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product


class CudaIntegers(nn.Module):
    """Integers times integers, as an NVIDIA GPU multiplies them."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        values_OI, scale_O1 = _rounded(weight_OI)
        self._values_OI = _Moved(values_OI)
        self._scale_O1 = _Moved(scale_O1)

    def forward(self, x_1TI: Tensor) -> Tensor:
        """The product, [1, T, O]."""
        x_TI = x_1TI[0].float()
        scale_T1 = _scale(x_TI)
        whole_TI = (x_TI / scale_T1).round().to(torch.int8)
        count = len(whole_TI)
        rows = -(-max(count, _FEWEST_ROWS) // _ROWS_BY) * _ROWS_BY
        whole_TI = functional.pad(whole_TI, (0, 0, 0, rows - count))
        product_TO = torch._int_mm(whole_TI, self._values_OI.T)[:count].float()
        return product_TO.mul_(scale_T1).mul_(self._scale_O1.T).to(x_1TI.dtype).unsqueeze(0)


class WidenedIntegers(nn.Module):
    """Integers that become what the model computes in whenever they are used."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        values_OI, scale_O1 = _rounded(weight_OI)
        self._values_OI = _Moved(values_OI)
        self._scale_O1 = _Moved(scale_O1)

    def forward(self, x_1TI: Tensor) -> Tensor:
        """The product, [1, T, O]."""
        weight_OI = self._values_OI.float().mul_(self._scale_O1)
        return functional.linear(x_1TI, weight_OI.to(x_1TI.dtype))


class PackedHalves(nn.Module):
    """On a CPU; torch lays the weights out."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        levels_OI, scale_OG, least_OG = _levels(weight_OI)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(levels_OI.int(), 1)
        middle_OG = least_OG + 8 * scale_OG  # where torch counts the levels from
        both_GO2 = torch.stack((scale_OG.T, middle_OG.T), dim=-1)
        self._scales_GO2 = both_GO2.to(weight_OI.dtype).contiguous()

    def forward(self, x_1TI: Tensor) -> Tensor:
        """The product, [1, T, O]."""
        return torch._weight_int4pack_mm_for_cpu(
            x_1TI[0].contiguous(), self._packed, _GROUP, self._scales_GO2
        ).unsqueeze(0)


class WidenedHalves(nn.Module):
    """Two in a byte; they become what the model computes in whenever they are used."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        levels_OI, scale_OG, least_OG = _levels(weight_OI)
        halves = levels_OI[:, ::2] | levels_OI[:, 1::2] << 4
        groups = (one.to(weight_OI.dtype).unsqueeze(-1) for one in (scale_OG, least_OG))
        self._halves = _Moved(halves)
        self._scale_OG1, self._least_OG1 = map(_Moved, groups)

    def forward(self, x_1TI: Tensor) -> Tensor:
        """The product, [1, T, O]."""
        levels_OI = torch.stack((self._halves & 15, self._halves >> 4), dim=-1).flatten(1)
        groups_OGN = levels_OI.unflatten(1, (-1, _GROUP)).to(x_1TI.dtype)
        weight_OGN = torch.addcmul(self._least_OG1, groups_OGN, self._scale_OG1)
        return functional.linear(x_1TI, weight_OGN.flatten(1))


def _Moved(tensor: Tensor) -> nn.Buffer:  # noqa: N802 - what it makes
    """Goes where the module goes."""
    return nn.Buffer(tensor, persistent=False)


def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, and the scale of each row."""
    wide_OI = weight_OI.float()
    scale_O1 = _scale(wide_OI)
    return (wide_OI / scale_O1).round_().to(torch.int8), scale_O1


def _scale(rows: Tensor) -> Tensor:
    """By which the largest of each row is the largest whole number."""
    return rows.abs().amax(1, keepdim=True).clamp_(min=_SMALLEST).div_(_LARGEST)


def _levels(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels from 0 to 15, and for each group of a row their distance and the lowest."""
    groups_OGN = weight_OI.float().unflatten(1, (-1, _GROUP))
    least_OG, most_OG = groups_OGN.amin(2), groups_OGN.amax(2)
    scale_OG = ((most_OG - least_OG) / _LEVELS).clamp_(min=_SMALLEST)
    levels_OGN = (groups_OGN - least_OG.unsqueeze(-1)).div_(scale_OG.unsqueeze(-1)).round_()
    return levels_OGN.clamp_(0, _LEVELS).flatten(1).to(torch.uint8), scale_OG, least_OG


def _multiplies_integers() -> bool:
    found = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(map(found.get, _INSTRUCTIONS))
