"""How far two encoders of one prompt are apart."""

import math
import struct
from collections.abc import Sequence
from operator import mul

from zimage_core.tensors import TensorData

SAME_COSINE, NEAR_COSINE = 0.999, 0.995
"""Of the worst token: as good as equal from there on, and wrong below."""

_SMALLEST = 1e-30


def least_cosine(one: TensorData, other: TensorData) -> float:
    """The cosine of the token whose two rows differ most. The first token is left out: its values
    are thousands of times as large as any other's, and say nothing about the prompt."""
    return min(cosines(one, other), default=1.0)


def cosines(one: TensorData, other: TensorData) -> list[float]:
    """Of each token's two rows, from the second on; -1 for what is no number."""
    width = one.shape[1]
    a, b = _numbers(one), _numbers(other)
    rows = range(width, len(a), width)
    found = (_cosine(a[at : at + width], b[at : at + width]) for at in rows)
    return [-1.0 if math.isnan(cosine) else cosine for cosine in found]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product: float = sum(map(mul, a, b))
    return product / max(math.hypot(*a) * math.hypot(*b), _SMALLEST)


def _numbers(tensor: TensorData) -> Sequence[float]:
    data = tensor.data
    if tensor.element_type == "bfloat16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[::2], data[1::2]
        data = bytes(wide)
    letter, size = ("e", 2) if tensor.element_type == "float16" else ("f", 4)
    return struct.unpack(f"<{len(data) // size}{letter}", data)
