"""The weights that a training learns: for each linear that it changes, two halves of a low-rank
change, float32 whatever the model computes in.

Shapes: R a rank, I a linear's inputs, O its outputs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dit_service.model.adapter_loading import place_of
from dit_service.model.adapters import Adapter, Change, Use, Uses
from dit_service.model.transformer import ZImageTransformer
from dit_service.training.draws import generator
from zimage_core.planning.training import Target

DOWN, UP = "lora_A.weight", "lora_B.weight"


class Lora:
    """One, and what of the model it changes."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        model: ZImageTransformer,
        seed: int,
        given: Mapping[str, Tensor],
    ) -> None:
        """Begins by chance; goes on with other weights where some are given."""
        self._targets = targets
        self._dtype = model.dtype
        begun = given or fresh(targets, seed)
        self.weights = {  # in an order of their own: sums over them are of that order
            name: begun[name].to(model.device, copy=True).requires_grad_()
            for name in halves(targets)
        }
        """The halves by their names, such as "layers.0.attention.to_q.lora_A.weight"."""

    def uses(self, weights: Mapping[str, Tensor]) -> Uses:
        """Such weights as the model takes adapters: gradients reach them through it."""
        parts: defaultdict[str, dict[str, Change]] = defaultdict(dict)
        for linear, target in self._targets.items():
            down_RI, up_OR = _halves(linear, weights)
            part, name = place_of(linear)
            # Copies: compiled code would be of another form once a weight itself has a gradient.
            down_RI, up_OR = (half.to(self._dtype, copy=True) for half in (down_RI, up_OR))
            change = Change(down_RI, up_OR, target.strength)
            parts[part][name] = change
        return (Use(Adapter(dict(parts)), 1.0),)

    def has_moved(self) -> None:
        """The next use is of the weights as they are."""

    def file_tensors(
        self, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Such weights as an adapter's file has them: the strength is part of the second half, so
        that every program reads the same."""
        for linear, target in self._targets.items():
            down_RI, up_OR = _halves(linear, weights)
            yield f"diffusion_model.{linear}.{DOWN}", down_RI.to(dtype)
            yield f"diffusion_model.{linear}.{UP}", (up_OR * target.strength).to(dtype)

    def close(self) -> None:
        """The model is as it was."""


def halves(targets: Mapping[str, Target]) -> dict[str, tuple[int, int]]:
    """The sizes of the weights by their names."""
    sizes = {}
    for linear, target in targets.items():
        sizes[f"{linear}.{DOWN}"] = target.rank, target.in_width
        sizes[f"{linear}.{UP}"] = target.out_width, target.rank
    return sizes


def fresh(targets: Mapping[str, Target], seed: int) -> dict[str, Tensor]:
    """The weights before the first step: they change nothing yet."""
    weights = {name: torch.zeros(size, device="cpu") for name, size in halves(targets).items()}
    for linear, target in targets.items():
        bound = target.in_width**-0.5
        own = generator(seed, "weights", linear)
        weights[f"{linear}.{DOWN}"].uniform_(-bound, bound, generator=own)
    return weights


def _halves(linear: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return weights[f"{linear}.{DOWN}"], weights[f"{linear}.{UP}"]
