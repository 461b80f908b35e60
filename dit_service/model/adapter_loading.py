"""Adapters from their files onto the device."""

import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_service.model.adapters import Adapter, Change
from zimage_core.formats.adapter_file import read_plan, refusal
from zimage_core.planning.flops import DitShape
from zimage_core.planning.linears import linears

_PART = re.compile(r"(?P<part>(layers|noise_refiner|context_refiner)\.\d+|\w+)\.(\d+-1\.?)?")


def load_adapter(path: Path, shape: DitShape, device: torch.device, dtype: torch.dtype) -> Adapter:
    """Raises InvalidRequest for a file that cannot be used with a model of this shape."""
    plan = read_plan(path, linears(shape))
    parts: defaultdict[str, dict[str, Change]] = defaultdict(dict)
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            names = {name for change in plan.changes for name in (change.down, change.up)}
            hosted = {
                name: _half(name, tensors.get_tensor(name)).to(dtype, copy=True) for name in names
            }
    except SafetensorError as error:
        raise refusal("ADAPTER_FILE", str(error)) from error
    halves = {name: _fetched(half, device) for name, half in hosted.items()}
    for change in plan.changes:
        up_OR = halves[change.up][change.first_row : change.first_row + change.row_count]
        part, name = place_of(change.linear)
        parts[part][name] = Change(halves[change.down], up_OR, change.strength)
    return Adapter(dict(parts))


def _fetched(half: Tensor, device: torch.device) -> Tensor:
    """From pinned memory a GPU fetches it when it comes to it; nobody waits behind its steps."""
    if device.type == "cuda":
        return half.pin_memory().to(device, non_blocking=True)
    return half.to(device)


def _half(name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise refusal("ADAPTER_NOT_FINITE", f"{name} holds values that are no finite numbers")
    return tensor.flatten(1)


def place_of(linear: str) -> tuple[str, str]:
    """The part of the model that a linear is in, and its name there; raises KeyError for what is in
    none."""
    found = _PART.match(linear)
    if not found:
        raise KeyError(linear)
    return found["part"], linear[found.end() :]
