"""Beginnings of prompts that ran before: no token sees a later one, so what begins the same is the
same so far."""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from encoder_service.model.qwen import Run, Text
from zimage_core.embeddings import Blend

_BLOCK = 8
"""Tokens that are kept and found together."""

_Key = bytes


class Prefixes:
    """So many bytes of them on the device, those that were met last."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._blocks: OrderedDict[_Key, Run] = OrderedDict()
        """Each by all tokens up to its end."""
        self.bytes = 0

    def begun(self, text: Text) -> Text:
        """The text with as much of its beginning as is known, and at least one token to run."""
        if not self._most_bytes:
            return text
        known: list[Run] = []
        for key in self._keys(text.token_ids[:-1], text.blend):
            if key not in self._blocks:
                break
            known.append(self._blocks[key])
        if not known:
            return replace(text, is_kept=True)
        state = torch.cat([run.state for run in known])
        keys_values = torch.cat([_shown(run) for run in known], dim=-2)
        return replace(text, is_kept=True, begun=Run(state, keys_values))

    def keep(self, text: Text, rest: Run) -> None:
        """Keeps the whole blocks of a text whose rest has run. The last of them counts as met
        first, so that a beginning is never dropped before what goes on from it."""
        begun = len(text.token_ids) - len(text.rest)
        keys = list(self._keys(text.token_ids, text.blend))
        for index, key in enumerate(keys):
            if key in self._blocks:
                continue
            if index * _BLOCK < begun:
                return  # its own beginning was dropped meanwhile
            self._enter(key, _cut(rest, index * _BLOCK - begun))
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        while self.bytes > self._most_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= _size(oldest)

    def clear(self) -> None:
        """Gives all of it back."""
        self._blocks.clear()
        self.bytes = 0

    def _enter(self, key: _Key, run: Run) -> None:
        self._blocks[key] = run
        self.bytes += _size(run)

    def _keys(self, token_ids: Sequence[int], blend: Blend) -> Iterator[_Key]:
        """Of the whole blocks, each made of the one before."""
        key = repr(blend).encode()
        for end in range(_BLOCK, len(token_ids) + 1, _BLOCK):
            block = struct.pack(f"<{_BLOCK}i", *token_ids[end - _BLOCK : end])
            key = hashlib.blake2b(key + block, digest_size=32).digest()
            yield key


def _cut(run: Run, begin: int) -> Run:
    """A block in memory of its own."""
    return Run(
        run.state[begin : begin + _BLOCK].clone(),
        _shown(run).narrow(-2, begin, _BLOCK).clone(),
    )


def _size(run: Run) -> int:
    return sum(_bytes(tensor) for tensor in (run.state, _shown(run)))


def _shown(run: Run) -> Tensor:
    assert run.keys_values is not None
    return run.keys_values


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
