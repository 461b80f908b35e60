"""The model's own weights, learnt: in float32, beside those that it computes with where they are
narrower.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from dit_service.model.adapters import Uses
from dit_service.model.transformer import ZImageTransformer


class Whole:
    """All of a model. It changes while it is learnt, for whoever draws with it, too."""

    def __init__(self, model: ZImageTransformer, given: Mapping[str, Tensor]) -> None:
        """Begins with the model as it is; goes on with other weights where some are given."""
        self._computing = dict(model.named_parameters())
        self._is_apart = model.dtype != torch.float32
        self.weights: dict[str, Tensor] = dict(self._computing)
        """What is learnt, by the names of the model."""
        if self._is_apart:
            self.weights = {
                name: one.detach().float().requires_grad_() for name, one in self.weights.items()
            }
        model.requires_grad_()
        self._handles = [
            one.register_post_accumulate_grad_hook(self._widened(self.weights[name]))
            for name, one in self._computing.items()
            if self._is_apart
        ]
        with torch.no_grad():
            for name, one in given.items():
                self.weights[name].copy_(one)
        self.has_moved()

    def uses(self, _weights: Mapping[str, Tensor]) -> Uses:
        """Nothing is beside the model, which has its own as they are."""
        return ()

    @torch.no_grad()
    def has_moved(self) -> None:
        """The model computes with the weights as they are now."""
        if self._is_apart:
            for name, one in self._computing.items():
                one.copy_(self.weights[name])

    def file_tensors(
        self, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights as the file of a transformer has them."""
        for name, one in weights.items():
            yield name, one.to(dtype)

    def close(self) -> None:
        """Nothing is learnt any more; the model stays as it is."""
        for handle in self._handles:
            handle.remove()
        for one in self._computing.values():
            one.requires_grad_(False)
            one.grad = None

    def _widened(self, weight: Tensor) -> Callable[[Tensor], None]:
        """Adds a gradient to that of the weight in float32, as soon as it is there."""

        def widen(computing: Tensor) -> None:
            gradient = computing.grad
            computing.grad = None
            assert gradient is not None
            if weight.grad is None:
                weight.grad = gradient.float()
            else:
                weight.grad.add_(gradient)

        return widen
