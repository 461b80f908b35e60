"""Tensors as files hold them, before they become weights of a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_service.model.narrow import narrowed


class Stored(NamedTuple):
    """Values, and what they are to be multiplied with where they are narrow: a number, or one for
    each row."""

    values: Tensor
    scale: Tensor | None = None

    def chunk(self, count: int) -> "list[Stored]":
        """Its rows in so many parts."""
        has_rows = self.scale is not None and self.scale.numel() > 1
        scales = self.scale.chunk(count) if self.scale is not None and has_rows else None
        return [
            Stored(values, scales[index] if scales else self.scale)
            for index, values in enumerate(self.values.chunk(count))
        ]

    def full(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What the values stand for. Copied even where nothing changes: a view would need the file
        for as long as it lives."""
        if self.scale is None:
            return self._there(device).to(dtype, copy=True)
        scale = self._scale(device)
        return (self._there(device).float() * scale).to(dtype)

    def narrow(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A byte for each value, and the scale of each row."""
        values = self._there(device)
        if values.dtype == dtype:  # the same bytes
            weight_OI, scale_O1 = values, torch.ones(len(values), 1, device=device)
        else:
            weight_OI, scale_O1 = narrowed(values, dtype)
        return weight_OI, scale_O1 if self.scale is None else scale_O1 * self._scale(device)

    def _there(self, device: torch.device) -> Tensor:
        """The values on the device; wider where that knows no eight-bit floats."""
        is_unknown = device.type == "mps" and self.values.dtype.itemsize == 1
        return (self.values.float() if is_unknown else self.values).to(device)

    def _scale(self, device: torch.device) -> Tensor:
        assert self.scale is not None
        return self.scale.to(device).float().reshape(-1, 1)


@dataclass(frozen=True, slots=True)
class Contents:
    """A file: the shapes of its tensors, the format of weights that loses nothing of them, and the
    way to read them one after the other."""

    shapes: Mapping[str, tuple[int, ...]]
    weights: str
    read: Callable[[], Iterator[tuple[str, Stored]]]
