"""The device that a worker runs on, and what of it can move the last bits of a picture."""

import ctypes
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from zimage_core.errors import InvalidSettings
from zimage_core.settings import DitSettings
from zimage_core.tensors import TensorData, byte_count

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""torch's types by the names that settings, files and the wire use."""

NAMES = {kind: name for name, kind in TYPES.items()}


_FREE_FOR_STEPS = 0.8
"""The rest is for pictures being developed, and for what fits between pieces."""
_HOST_BYTES_FOR_STEPS = 2.0**31
_BYTES_FOR_PICTURES = 2.0**31
"""A step and the VAE at 1024x1024."""


def choose_device(wanted: str) -> torch.device:
    """The device wanted, or the best there is; raises when it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[wanted]:
        allowed = ", ".join(name for name, is_there in there.items() if is_there)
        raise InvalidSettings(
            f"device {wanted}: this machine or this build of torch {torch.__version__} has none; "
            f"there is {allowed}",
            reason="NO_DEVICE",
            fields={"field": "device", "given": wanted, "allowed": allowed},
        )
    return torch.device(wanted)


def choose_type(wanted: str, device: torch.device) -> torch.dtype:
    """The type that the transformer computes in: float16 by itself only where a GPU is too old for
    bfloat16, as its rounding is finer but its range is narrow."""
    if wanted != "auto":
        return TYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    is_old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if is_old else torch.bfloat16


def sum_in_full() -> None:
    """Products of float16 have to be summed in float32: partial sums would not fit it."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def choose_vae_type(wanted: str, device: torch.device) -> torch.dtype:
    """The type that the VAE computes in; its values leave the range of float16."""
    dtype = choose_type(wanted, device)
    return torch.float32 if dtype == torch.float16 else dtype


def describe(device: torch.device) -> str:
    """The device's kind and name."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "mps":
        return f"mps {platform.machine()}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def library_versions() -> dict[str, str]:
    """The libraries that do the arithmetic. In plain words: to unpickle torch's own kind of version
    the front would import torch."""
    return {"torch": str(torch.__version__), "diffusers": diffusers.__version__}


def weight_room(device: torch.device, settings: DitSettings) -> float:
    """The memory that the transformer's weights may take: as set; else what a GPU has besides what
    adapters are promised and a picture takes. Elsewhere the device's memory is the host's."""
    if settings.max_weight_bytes is not None:
        return settings.max_weight_bytes
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()  # a model that was tried before may have left its memory there
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - settings.max_adapter_bytes - _BYTES_FOR_PICTURES)


def room_bytes(device: torch.device, promised: int) -> float:
    """The memory that steps may take, now that the model is loaded; so much is promised besides."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        return _HOST_BYTES_FOR_STEPS
    return _FREE_FOR_STEPS * max(0, free - promised)


def peak_bytes(device: torch.device) -> int | None:
    """What the device's memory held at most since the last time; None where nobody knows."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Fence:
    """Lets the host run one step ahead of the device, and no further. Whoever wants to know hears
    how long a step took when it is done: on a GPU by its own clock, and not the host's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: _Timed | None = None

    @contextmanager
    def step(self, done: Callable[[float], None]) -> Iterator[None]:
        """A step that the block hands to the device; waits for the one before it. `done` hears of
        its seconds, at once or while the next is under way."""
        if self._device.type == "cpu":  # the host does the work itself
            began = time.monotonic()
            yield
            done(time.monotonic() - began)
            return
        step = _Timed(done, self._event(), self._event())
        step.began.record()
        yield
        step.ended.record()
        if self._before is not None:
            self._before.tell()
        self._before = step

    def _event(self) -> torch.Event:
        return torch.Event(self._device, enable_timing=True)


@dataclass(frozen=True, slots=True)
class _Timed:
    """A step on the device's own clock."""

    done: Callable[[float], None]
    began: torch.Event
    ended: torch.Event

    def tell(self) -> None:
        """Waits for its end."""
        self.ended.synchronize()
        self.done(self.began.elapsed_time(self.ended) / 1000)


class Download:
    """Tensors on their way to the host; both go on with other work meanwhile."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        if device.type == "cpu":
            self._hosted, self._there = tensors, None
            return
        pinned = device.type == "cuda"
        hosted = [torch.empty(one.shape, dtype=one.dtype, pin_memory=pinned) for one in tensors]
        self._hosted = tuple(
            host.copy_(one, non_blocking=True) for host, one in zip(hosted, tensors, strict=True)
        )
        self._there = torch.Event(device)
        self._there.record()

    @property
    def is_there(self) -> bool:
        """Whether `wait` would return at once."""
        return self._there is None or self._there.query()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the CPU."""
        self.pause()
        return self._hosted

    def pause(self) -> None:
        """Returns when they are there."""
        if self._there is not None:
            self._there.synchronize()

    def leave(self) -> None:
        """Nobody wants them any more; what was begun goes on."""


def to_device(data: TensorData, device: torch.device) -> Tensor:
    """The tensor of plain data: copied once, into pinned memory where a GPU fetches it from. Raises
    ValueError unless its elements fill its shape exactly."""
    if len(data.data) != byte_count(data.element_type, data.shape):
        raise ValueError(f"{len(data.data)} bytes are no {data.element_type} {data.shape}")
    host = torch.empty(data.shape, dtype=TYPES[data.element_type], pin_memory=device.type == "cuda")
    ctypes.memmove(host.data_ptr(), data.data, len(data.data))
    return host.to(device, non_blocking=True)
