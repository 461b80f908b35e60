"""Blocks whose large weights stay in host memory and come to the device when it is their turn.

The linears of such a block are views of one of two buffers on the device, which the blocks take
turns in: while one computes, the weights of the next arrive in the other buffer.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from zimage_core.planning.memory import BUFFERS

_ALIGNMENT = 256
_PIECE_BYTES = 1 << 25


class Streaming:
    """Some blocks of a model, by name and in the order in which they run; an even number of them,
    so that the first of the next step finds its buffer free while the last of this one runs."""

    def __init__(self, linears: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        """Takes over the weights of those linears, which are in host memory."""
        if len(linears) % BUFFERS:
            raise ValueError(f"{len(linears)} blocks cannot take turns in {BUFFERS} buffers")
        self._names = list(linears)
        self._turns = {name: turn for turn, name in enumerate(self._names)}
        self._copies = _Copies(device)
        size = sum(_room(weight) for _, _, weight in _weights(next(iter(linears.values()))))
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)
        ]
        self._held: list[int | None] = [None] * BUFFERS
        self._hosted = [
            _moved(parts, self._buffers[turn % BUFFERS])
            for turn, parts in enumerate(linears.values())
        ]

    def __len__(self) -> int:
        """How many blocks take turns."""
        return len(self._names)

    def bring(self, name: str) -> None:
        """Makes a block's weights be there for what is asked of the device next, and has those of
        the block after it fetched meanwhile. Blocks that do not take turns are there."""
        turn = self._turns.get(name)
        if turn is None:
            return
        if self._held[turn % BUFFERS] != turn:  # the first of all
            self._fetch(turn)
        self._copies.wait(turn % BUFFERS)
        self._fetch((turn + 1) % len(self._names))

    def _fetch(self, turn: int) -> None:
        buffer = turn % BUFFERS
        self._held[buffer] = turn
        self._copies.copy(self._buffers[buffer], self._hosted[turn], buffer)


class _Copies:
    """The way from host memory to the device, beside its computing."""

    def __init__(self, device: torch.device) -> None:
        self._is_host = device.type == "cpu"
        if not self._is_host:
            self._stream = torch.Stream(device)
            self._arrived = [torch.Event(device) for _ in range(BUFFERS)]

    def copy(self, to: Tensor, hosted: Sequence[Tensor], number: int) -> None:
        """Begins when all is done that the device was asked for before: it may read the buffer."""
        if self._is_host:
            _fill(to, hosted)
            return
        self._stream.wait_stream(torch.accelerator.current_stream(to.device))
        with self._stream:
            _fill(to, hosted)
            self._arrived[number].record(self._stream)

    def wait(self, number: int) -> None:
        """What is asked of the device from now on comes after the copy."""
        if not self._is_host:
            torch.accelerator.current_stream().wait_event(self._arrived[number])


def _fill(to: Tensor, pieces: Sequence[Tensor]) -> None:
    for place, piece in zip(to.split(_PIECE_BYTES), pieces, strict=True):
        place.copy_(piece, non_blocking=True)


def _weights(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in modules:
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            yield module, name, weight


def _room(weight: Tensor) -> int:
    return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT


def _moved(modules: Sequence[nn.Module], buffer: Tensor) -> list[Tensor]:
    """The weights in host memory, in a row; the modules have views of the buffer instead."""
    hosted = torch.empty(buffer.nbytes, dtype=torch.uint8)
    offset = 0
    for module, name, weight in list(_weights(modules)):
        place = slice(offset, offset + weight.nbytes)
        hosted[place].view(weight.dtype).view(weight.shape).copy_(weight)
        there = buffer[place].view(weight.dtype).view(weight.shape)
        if isinstance(weight, nn.Parameter):
            there = nn.Parameter(there, requires_grad=False)
        setattr(module, name, there)
        offset += _room(weight)
    return _pinned(hosted, buffer.device)


def _pinned(memory: Tensor, device: torch.device) -> list[Tensor]:
    """Where a GPU fetches it from while it computes; in pieces, as the allocator of such memory
    rounds each up to a power of two."""
    pieces = memory.split(_PIECE_BYTES)
    return [piece.pin_memory() for piece in pieces] if device.type == "cuda" else list(pieces)
