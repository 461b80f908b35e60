"""Adapters beside the weights: low-rank changes that each sample of a call chooses for itself.

A linear runs once over all tokens, then each stretch of tokens gets what its own adapters add. So
no weight is ever touched, and whoever uses none computes what it computes without them.
Shapes: T packed tokens, I a linear's inputs, O its outputs, R a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count, groupby, pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class Change(NamedTuple):
    """What an adapter adds to a linear: `strength` times up times down."""

    down_RI: Tensor
    up_OR: Tensor
    strength: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """One on the device; its changes by the part of the model that a linear is in, such as
    "layers.3" or "cap_embedder", and by its name there."""

    parts: Mapping[str, Mapping[str, Change]]

    @cached_property
    def value_count(self) -> int:
        """How many multiplications it adds to each token."""
        changes = (change for part in self.parts.values() for change in part.values())
        return sum(change.down_RI.numel() + change.up_OR.numel() for change in changes)


@dataclass(frozen=True, slots=True)
class Use:
    """An adapter, and how strong it shall be: 1 is as it was trained."""

    adapter: Adapter
    scale: float


Uses = tuple[Use, ...]
"""What a sample uses, in the order in which it is added."""


class _Stretch(NamedTuple):
    begin: int
    end: int
    scale: float
    parts: Mapping[str, Mapping[str, Change]]


class Beside:
    """What the adapters of a call add, by where its tokens lie."""

    def __init__(self, stretches: Sequence[_Stretch]) -> None:
        self._stretches = stretches

    def of(self, part: str) -> "BesidePart":
        """What they add in one part of the model."""
        found = [(s, s.parts[part]) for s in self._stretches if part in s.parts]
        return BesidePart(found) if found else NOTHING


class BesidePart:
    """What the adapters of a call add in one part of the model. A compiled graph sees whether they
    add anything, and one opaque operation: it serves all adapters."""

    def __init__(self, changes: Sequence[tuple[_Stretch, Mapping[str, Change]]]) -> None:
        self._changes = changes
        self.is_nothing = not changes
        self.handle = _handle(self)

    def through(self, linear: nn.Module, name: str, x_TI: Tensor) -> Tensor:
        """The linear's output for all tokens with what adapters add to it."""
        y_TO: Tensor = linear(x_TI)
        if not self.is_nothing:
            if torch.compiler.is_compiling() and torch.is_grad_enabled():
                return self._added(y_TO, x_TI, name)
            if torch.compiler.is_compiling():
                _opaque_add(y_TO, x_TI, self.handle, name)
            else:
                self.add(y_TO, x_TI, name)
        return y_TO

    def _added(self, y_TO: Tensor, x_TI: Tensor, name: str) -> Tensor:
        """The same for those who learn: all samples use the same, and gradients reach it."""
        for stretch, changes in self._changes:
            if change := changes.get(name):
                scale = stretch.scale * change.strength
                low_TR = x_TI @ change.down_RI.T
                y_TO = torch.addmm(y_TO, low_TR, change.up_OR.T, alpha=scale)
        return y_TO

    def add(self, y_TO: Tensor, x_TI: Tensor, name: str) -> None:
        """What they add alone, to the output of the linear of that name."""
        for stretch, changes in self._changes:
            if change := changes.get(name):
                tokens = slice(stretch.begin, stretch.end)
                low_TR = x_TI[tokens] @ change.down_RI.T
                scale = stretch.scale * change.strength
                y_TO[tokens].addmm_(low_TR, change.up_OR.T, alpha=scale)


_by_handle: WeakValueDictionary[int, BesidePart] = WeakValueDictionary()
"""How the opaque operation finds what it adds: operations take tensors and numbers alone."""
_handles = count()


def _handle(part: BesidePart) -> Tensor:
    number = next(_handles)
    _by_handle[number] = part
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("zimage::add_adapters", mutates_args=("y_TO",))
def _opaque_add(y_TO: Tensor, x_TI: Tensor, handle: Tensor, name: str) -> None:
    _by_handle[int(handle)].add(y_TO, x_TI, name)


@_opaque_add.register_fake
def _(y_TO: Tensor, x_TI: Tensor, handle: Tensor, name: str) -> None:
    pass


NOTHING = BesidePart(())


def beside(uses: Sequence[Uses], lengths: Sequence[int]) -> Beside:
    """For samples of so many tokens each; neighbours that use the same are one stretch."""
    bounds = pairwise([0, *accumulate(lengths)])
    stretches = []
    for same, samples in groupby(zip(uses, bounds, strict=True), key=lambda one: one[0]):
        tokens = [bound for _, bound in samples]
        stretches += [
            _Stretch(tokens[0][0], tokens[-1][1], use.scale, use.adapter.parts) for use in same
        ]
    return Beside(stretches)
