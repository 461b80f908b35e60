"""Embeddings in eight bits a number: half the room of bfloat16, by rows that have a scale each.

A number is a float of four bits of exponent and three of mantissa (E4M3, as torch's float8_e4m3fn);
a row's scale is the power of two that brings its largest to what that can hold. So what is small
beside an outlier stays as exact as the rest, down to a 28,000th of it.
"""

import functools
import json
import math
import struct
from array import array

from zimage_core.tensors import TensorData

TENSOR, SCALE = "embeddings", "embeddings_scale"
"""The names of both tensors in a file."""

_LARGEST = 448.0
_LEAST_EXPONENT, _BIAS, _STEPS = -6, 7, 8
_SIGN, _LARGEST_CODE = 0x80, 0x7E


def file(embedding: TensorData) -> bytes:
    """A safetensors file of an embedding's rows, float32 or bfloat16."""
    count, width = embedding.shape
    halves = _upper_halves(embedding)
    codes, scales = bytearray(), []
    for row in range(count):
        own = halves[row * width : (row + 1) * width]
        exponent = _exponent(own)
        codes += bytes(map(_codes(exponent).__getitem__, own))
        scales.append(2.0**exponent)
    described = {
        SCALE: {"dtype": "F32", "shape": [count, 1], "data_offsets": [0, 4 * count]},
        TENSOR: {
            "dtype": "F8_E4M3",
            "shape": [count, width],
            "data_offsets": [4 * count, 4 * count + len(codes)],
        },
    }
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{count}f", *scales) + codes


def _upper_halves(embedding: TensorData) -> "array[int]":
    """The numbers in bfloat16: the upper half of each, the nearest."""
    if embedding.element_type == "bfloat16":
        return array("H", embedding.data)
    assert embedding.element_type == "float32"
    whole = array("I", embedding.data)
    return array("H", ((one + 0x7FFF + (one >> 16 & 1)) >> 16 for one in whole))


def _exponent(row: "array[int]") -> int:
    """Of the scale."""
    largest = _value(max((half & 0x7FFF for half in row), default=0))
    return math.ceil(math.log2(largest / _LARGEST)) if largest else 0


@functools.lru_cache(maxsize=64)
def _codes(exponent: int) -> bytes:
    """Of every bfloat16, by its bits, divided by that power of two."""
    above = [_code(_value(half), exponent) for half in range(0x8000)]
    return bytes([*above, *(code | _SIGN for code in above)])


def _value(half: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", half << 16))[0])


def _code(value: float, exponent: int) -> int:
    """Of one that is not below zero; what is too large, or no number, is the largest."""
    if not value < math.inf:
        return _LARGEST_CODE
    value = math.ldexp(value, -exponent)
    _, above = math.frexp(value)
    own = max(above - 1, _LEAST_EXPONENT) if value else _LEAST_EXPONENT
    steps = round(math.ldexp(value, -own) * _STEPS)  # from 8 on with the leading one
    return min(steps + (own + _BIAS - 1) * _STEPS, _LARGEST_CODE)
