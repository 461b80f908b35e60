"""The digest of a tensor's values, whatever type and file they came in."""

import hashlib
from collections.abc import Iterable, Iterator

from zimage_core.formats.weights import Weight

_CHUNK_BYTES = 8 << 20


def weight_digest(weight: Weight) -> str:
    """Over shape and values: as bfloat16 where that loses nothing, else as float32. Types that are
    no plain floats, such as fp8, are lossy and stand for themselves."""
    kind: str = weight.element_type
    parts: Iterable[bytes | memoryview] = chunks(weight)
    if kind in ("F32", "F16"):
        narrow = all(map(is_bfloat16, _float32(weight)))
        kind = "BF16" if narrow else "F32"
        parts = map(as_bfloat16, _float32(weight)) if narrow else _float32(weight)
    digest = hashlib.sha256(f"{kind}{list(weight.shape)}".encode())
    for chunk in parts:
        digest.update(chunk)  # releases the interpreter: several tensors at once are worth it
    return digest.hexdigest()


def chunks(weight: Weight) -> Iterator[memoryview]:
    """The bytes, so many at a time that memory stays small."""
    starts = range(0, len(weight.data), _CHUNK_BYTES)
    return (weight.data[start : start + _CHUNK_BYTES] for start in starts)


def _float32(weight: Weight) -> Iterator[bytes]:
    parts = map(bytes, chunks(weight))
    return parts if weight.element_type == "F32" else map(_widened, parts)


def _widened(halves: bytes) -> bytes:
    import numpy as np  # whatever runs an encoder has it, and float16 alone needs it

    return np.frombuffer(halves, "<f2").astype("<f4").tobytes()


def is_bfloat16(floats: bytes) -> bool:
    """Whether the lower halves are all zero."""
    zeros = bytes(len(floats) // 4)
    return floats[0::4] == zeros and floats[1::4] == zeros


def as_bfloat16(floats: bytes) -> bytes:
    """The upper halves."""
    upper = bytearray(len(floats) // 2)
    upper[0::2], upper[1::2] = floats[2::4], floats[3::4]
    return bytes(upper)
