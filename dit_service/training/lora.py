"""The weights that a training learns: for each linear that it changes, two halves of a low-rank
change, float32 whatever the model computes in.

Shapes: R a rank, I a linear's inputs, O its outputs.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from dit_service.model.adapter_loading import place_of
from dit_service.model.adapters import Adapter, Change
from dit_service.training.draws import generator
from zimage_core.planning.training import Target

DOWN, UP = "lora_A.weight", "lora_B.weight"


Weights = Mapping[str, Tensor]
"""The halves by their names, such as "layers.0.attention.to_q.lora_A.weight"."""


def fresh(targets: Mapping[str, Target], seed: int, device: torch.device) -> dict[str, Tensor]:
    """The weights before the first step: they change nothing yet."""
    weights = {}
    for linear, target in targets.items():
        bound = target.in_width**-0.5
        down_RI = torch.empty(target.rank, target.in_width, device="cpu")
        down_RI.uniform_(-bound, bound, generator=generator(seed, "weights", linear))
        weights[f"{linear}.{DOWN}"] = down_RI.to(device)
        weights[f"{linear}.{UP}"] = torch.zeros(target.out_width, target.rank, device=device)
    return weights


def adapter(targets: Mapping[str, Target], weights: Weights, dtype: torch.dtype) -> Adapter:
    """The weights as a model of that type takes adapters: gradients reach them through it."""
    parts: defaultdict[str, dict[str, Change]] = defaultdict(dict)
    for linear, target in targets.items():
        down_RI, up_OR = _halves(linear, weights)
        part, name = place_of(linear)
        parts[part][name] = Change(down_RI.to(dtype), up_OR.to(dtype), target.strength)
    return Adapter(dict(parts))


def file_tensors(
    targets: Mapping[str, Target], weights: Weights, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weights as a file has them: the strength is part of the second half, so that every
    program reads the same."""
    tensors = {}
    for linear, target in targets.items():
        down_RI, up_OR = _halves(linear, weights)
        tensors[f"diffusion_model.{linear}.{DOWN}"] = down_RI.to(dtype)
        tensors[f"diffusion_model.{linear}.{UP}"] = (up_OR * target.strength).to(dtype)
    return tensors


def _halves(linear: str, weights: Weights) -> tuple[Tensor, Tensor]:
    return weights[f"{linear}.{DOWN}"], weights[f"{linear}.{UP}"]
