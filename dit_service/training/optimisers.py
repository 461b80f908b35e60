"""From gradients to steps, by the optimisers of libraries."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zimage_core.planning.training import Optimizer


class Stepper:
    """An optimiser over named weights, with its state by their names."""

    def __init__(
        self, settings: Optimizer, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """With the state that it left; empty for one that begins."""
        self._settings = settings
        self._weights = weights
        self._optimizer = torch.optim.AdamW(
            list(weights.values()),
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        for name, tensor in state.items():
            weight, _, what = name.rpartition("/")
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
        return {
            f"{name}/{what}": torch.as_tensor(value)
            for name, weight in self._weights.items()
            for what, value in self._optimizer.state[weight].items()
        }
