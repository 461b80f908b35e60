"""Embeddings of more rows than the DiT takes, made to fit. Computed in float32, whatever they are
stored in."""

import numpy as np
from numpy.typing import NDArray

from zimage_core.embeddings import ATTENTION_POOL, INTERPOLATE, POOL
from zimage_core.tensors import TensorData

_Rows = NDArray[np.float32]

_NEIGHBOURS = 2
"""On either side, that a row is compared with."""
_SHORTEST = 1e-12


def compressed(tensor: TensorData, row_limit: int, mode: str) -> TensorData:
    """The tensor with as many rows as are allowed, if it has more."""
    rows, width = tensor.shape
    if rows <= row_limit:
        return tensor
    ways = {INTERPOLATE: _interpolated, POOL: _pooled, ATTENTION_POOL: _pooled_by_attention}
    fewer = ways[mode](_read(tensor), row_limit)
    return TensorData(tensor.element_type, (row_limit, width), _written(fewer, tensor.element_type))


def _interpolated(rows: _Rows, count: int) -> _Rows:
    """The first and the last stay as they are; a single one is the first."""
    places = np.arange(count) * ((len(rows) - 1) / max(1, count - 1))
    below = np.minimum(places.astype(np.int64), len(rows) - 2)
    share = (places - below).astype(np.float32)[:, None]
    between: _Rows = (1 - share) * rows[below] + share * rows[below + 1]
    return between


def _pooled(rows: _Rows, count: int) -> _Rows:
    """Windows as even as can be, which may share a row."""
    ends = [(i * len(rows) // count, -(-(i + 1) * len(rows) // count)) for i in range(count)]
    return np.stack([rows[begin:end].mean(axis=0) for begin, end in ends])


def _pooled_by_attention(rows: _Rows, count: int) -> _Rows:
    """In each region the rows have weights by how little they are like their neighbours."""
    regions = np.minimum(np.arange(len(rows)) * count // len(rows), count - 1)
    begins = np.searchsorted(regions, np.arange(count))
    rarity = _rarity(rows)
    weights = np.exp(rarity - np.maximum.reduceat(rarity, begins)[regions])
    weights /= np.add.reduceat(weights, begins)[regions]
    return np.add.reduceat(weights[:, None] * rows, begins, axis=0)


def _rarity(rows: _Rows) -> _Rows:
    """One less the mean cosine to the neighbours that are there."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.maximum(lengths, np.float32(_SHORTEST))
    likeness, counts = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
    for distance in range(1, min(_NEIGHBOURS, len(rows) - 1) + 1):
        cosines = (units[distance:] * units[:-distance]).sum(axis=1)
        likeness[distance:] += cosines
        likeness[:-distance] += cosines
        counts[distance:] += 1
        counts[:-distance] += 1
    return 1 - likeness / counts


def _read(tensor: TensorData) -> _Rows:
    if tensor.element_type == "bfloat16":
        halves = np.frombuffer(tensor.data, "<u2").astype(np.uint32)
        values = (halves << 16).view(np.float32)
    else:
        values = np.frombuffer(tensor.data, np.dtype(tensor.element_type)).astype(np.float32)
    return values.reshape(tensor.shape)


def _written(rows: _Rows, element_type: str) -> bytes:
    if element_type != "bfloat16":
        return rows.astype(np.dtype(element_type)).tobytes()
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1)  # of two as near, the even one
    return (nearest >> 16).astype("<u2").tobytes()
