"""Whether compiled code computes what it was made of."""

from torch import Tensor
from torch.nn import functional

_LEAST = 0.99
"""Rounding is another where operations are one; a compiler's fault is no rounding."""


def check_likeness(made: Tensor, computed: Tensor) -> None:
    """Raises ArithmeticError where they are not alike; rows of numbers."""
    likeness = float(functional.cosine_similarity(made, computed, dim=0))
    if not likeness >= _LEAST:  # nor is what is no number
        raise ArithmeticError(f"compiled code computes something else: cosine {likeness:.3f}")
