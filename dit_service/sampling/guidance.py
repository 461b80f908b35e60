"""Classifier-free guidance in the model's own scale: g = 0 is off, the usual w is 1 + g."""

import torch
from torch import Tensor
from torch.linalg import vector_norm


def guided(positive: Tensor, negative: Tensor, guidance: float, normalization: float) -> Tensor:
    """positive + g (positive - negative); its norm at most `normalization` times the positive's.

    Only ever shrinks, and stays on the device: no step waits for a norm.
    """
    prediction = positive + guidance * (positive - negative)
    if normalization > 0:
        longest = vector_norm(positive) * normalization
        length = vector_norm(prediction).clamp(min=torch.finfo(torch.float32).tiny)
        prediction = prediction * (longest / length).clamp(max=1.0)
    return prediction
