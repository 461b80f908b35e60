"""What a way to compute attention is, and where it can work."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Tensor], Tensor]
"""Queries, keys and values [tokens, heads, width] of samples of these lengths, and where these
begin and end, int32 on the device; to what each token gets, in the same shape."""

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Place:
    """Where attention shall be computed, and of what."""

    device: torch.device
    capability: tuple[int, int]
    """Of an NVIDIA GPU; zeros for what is none."""
    dtype: torch.dtype
    head_dim: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> "Place":
        """As this machine has it."""
        is_nvidia = device.type == "cuda" and torch.version.hip is None
        capability = torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)
        return cls(device, capability, dtype, head_dim)


@dataclass(frozen=True, slots=True)
class Backend:
    """One way. Sums are taken in another order than another's, so pictures differ in last bits."""

    attend: Attend
    package: str = "torch"
    """What has to be installed."""
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None = None
    """The first NVIDIA architecture that it works on, and the first that it does not any more; None
    for any device."""
    dtypes: Sequence[torch.dtype] = (*HALVES, torch.float32)
    max_head_dim: int = 256
    head_dim_multiple: int = 8
    is_lossy: bool = False
    """Whether it computes with fewer bits than it is given: for pictures, not for training."""

    def obstacle(self, place: Place) -> str:
        """Why it cannot work there; empty when it may."""
        if importlib.util.find_spec(self.package.partition(".")[0]) is None:
            return f"{self.package} is not installed"
        if self.capabilities:
            first, last = self.capabilities
            if not first <= place.capability < last:
                return f"it needs an NVIDIA GPU {_range(first, last)}, and here is {_told(place)}"
        if place.dtype not in self.dtypes:
            allowed = " or ".join(str(one).removeprefix("torch.") for one in self.dtypes)
            return f"it needs {allowed}"
        if place.head_dim > self.max_head_dim or place.head_dim % self.head_dim_multiple:
            multiple = f"and of multiples of {self.head_dim_multiple}"
            return f"it needs heads of {self.max_head_dim} at most, {multiple}"
        return ""


def _range(first: tuple[int, int], last: tuple[int, int]) -> str:
    above = f" and below {last[0]}.{last[1]}" if last[0] < 99 else ""
    return f"of compute capability {first[0]}.{first[1]} or more{above}"


def _told(place: Place) -> str:
    return f"{place.capability[0]}.{place.capability[1]}" if any(place.capability) else "none"
