"""From gradients to steps, by the optimisers of libraries."""

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import NotReady
from zimage_core.planning.training import Optimizer

_GROUP = "group"
"""What an optimiser keeps for all weights together, in the place of a weight's name."""
_OF_GROUP: Mapping[str, tuple[str, ...]] = {"prodigy": ("d", "d_max", "d_numerator", "k")}

Weights = list[Tensor]


class Stepper:
    """An optimiser over named weights, with its state by their names."""

    def __init__(
        self,
        settings: Optimizer,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        *,
        is_sparing: bool = False,
    ) -> None:
        """With the state that it left; empty for one that begins. A sparing one takes no memory
        for all weights at once. Raises NotReady for an optimiser that does not run here."""
        self._settings = settings
        self._weights = weights
        self._optimizer = _MAKERS[settings.name](list(weights.values()), settings, is_sparing)
        for name, tensor in state.items():
            weight, _, what = name.rpartition("/")
            if weight == _GROUP:
                self._optimizer.param_groups[0][what] = tensor.item()
                continue
            self._optimizer.state[weights[weight]][what] = (
                tensor if tensor.ndim == 0 else tensor.to(weights[weight].device)
            )

    def step(self, learning_rate: float) -> float | None:
        """Moves the weights by their gradients, which are gone then, and says how long the gradient
        was; one that is no finite number moves nothing, and None is said."""
        bound = self._settings.largest_gradient_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._weights.values(), bound))
        is_finite = norm < float("inf")
        if is_finite:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm if is_finite else None

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside weights and gradients."""
        of_weights = {
            f"{name}/{what}": torch.as_tensor(value)
            for name, weight in self._weights.items()
            for what, value in self._optimizer.state[weight].items()
        }
        [group] = self._optimizer.param_groups
        of_group = {
            f"{_GROUP}/{what}": torch.tensor(
                group[what], dtype=torch.float64 if isinstance(group[what], float) else None
            )
            for what in _OF_GROUP.get(self._settings.name, ())
        }
        return of_weights | of_group


def is_known(
    name: str, tensor: Tensor, shapes: Mapping[str, Sequence[int]], optimiser: str
) -> bool:
    """Whether a tensor may be part of such an optimiser's state for weights of these shapes."""
    weight, _, what = name.rpartition("/")
    if weight == _GROUP:
        return what in _OF_GROUP.get(optimiser, ()) and tensor.ndim == 0
    return weight in shapes and tensor.numel() <= max(math.prod(shapes[weight]), _LEAST_NUMEL)


def _adamw(weights: Weights, settings: Optimizer, is_sparing: bool) -> torch.optim.Optimizer:
    foreach = False if is_sparing else None
    return torch.optim.AdamW(weights, **_like_adam(settings), foreach=foreach)


def _adafactor(weights: Weights, settings: Optimizer, is_sparing: bool) -> torch.optim.Optimizer:
    foreach = False if is_sparing else None
    return torch.optim.Adafactor(weights, weight_decay=settings.weight_decay, foreach=foreach)


def _prodigy(weights: Weights, settings: Optimizer, _is_sparing: bool) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it speaks
        made: torch.optim.Optimizer = Prodigy(weights, **_like_adam(settings))
    return made


def _adamw_8bit(weights: Weights, settings: Optimizer, _is_sparing: bool) -> torch.optim.Optimizer:
    device = weights[0].device.type
    if device != "cuda":
        raise NotReady(
            f"optimizer adamw_8bit needs CUDA, and this service computes on {device}; adamw, "
            "adafactor and prodigy do not",
            reason="OPTIMIZER",
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise NotReady(
            "optimizer adamw_8bit needs bitsandbytes on the DiT service's machine: "
            "pip install bitsandbytes",
            reason="OPTIMIZER",
        ) from error
    made: torch.optim.Optimizer = AdamW8bit(weights, **_like_adam(settings))
    return made


def _like_adam(settings: Optimizer) -> dict[str, Any]:
    return {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }


_LEAST_NUMEL = 256
"""Of tables that come with small weights, too."""
_MAKERS: Mapping[str, Callable[[Weights, Optimizer, bool], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "adamw_8bit": _adamw_8bit,
}
