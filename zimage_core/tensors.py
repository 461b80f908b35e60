"""A tensor as plain data, for whoever has no tensor library: fronts, files, pipes, the SDK."""

import hashlib
import math
from dataclasses import dataclass

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The element types by the names that torch and safetensors users know, with their sizes."""


@dataclass(frozen=True, slots=True)
class TensorData:
    """Little-endian, row-major, without gaps; the worker makes the real one of it."""

    element_type: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def sha256(self) -> str:
        """The digest of the elements alone."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def media_type(self) -> str:
        """What the elements are."""
        return f"application/x-tensor; type={self.element_type}"


def byte_count(element_type: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor of this type and shape has."""
    return math.prod(shape) * ELEMENT_BYTES[element_type]
