"""Where the weights are: on the device for good, or only while somebody needs them there."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

_Place = tuple[dict[str, Any], str, Tensor]
"""What holds a tensor, under which name, and the tensor as it is in host memory."""


class Residence:
    """Of an encoder whose weights were loaded into host memory. They stay there as well, so that
    nothing has to be carried back; files that hold the same type are mapped, and take none."""

    def __init__(self, encoder: nn.Module, device: torch.device) -> None:
        self._device = device
        self._places = list(_tensors(encoder))
        self.is_away = True

    def arrive(self) -> None:
        """Brings all of them to the device."""
        if not self.is_away:
            return
        began = time.monotonic()
        try:
            for holder, name, tensor in self._places:
                there = tensor.to(self._device)
                is_weight = isinstance(tensor, nn.Parameter)
                holder[name] = nn.Parameter(there, requires_grad=False) if is_weight else there
        except Exception:
            self.leave()  # what did find room would keep it from others
            raise
        self.is_away = False
        _log.info("weights came to the device in %.2f s", time.monotonic() - began)

    def leave(self) -> None:
        """Gives the device's memory back to whoever else is on it."""
        for holder, name, tensor in self._places:
            holder[name] = tensor
        self.is_away = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()
        _log.info("weights left the device")


def _tensors(encoder: nn.Module) -> Iterator[_Place]:
    for module in encoder.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield holder, name, tensor
