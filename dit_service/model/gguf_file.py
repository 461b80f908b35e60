"""Transformers in GGUF files: numbers in blocks of a few bits, under ComfyUI's names."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from dit_service.model.stored import Contents, Stored
from zimage_core.errors import InvalidModel
from zimage_core.planning.memory import FULL

MAGIC = b"GGUF"
_PLAIN = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}


def contents(path: Path) -> Contents:
    """Raises InvalidModel for a file that cannot be read. On the device its numbers take a byte
    each, whatever they take in the file."""
    try:
        reader = GGUFReader(path)
    except Exception as error:  # a damaged file breaks the library in many ways
        raise InvalidModel.at(path, f"this GGUF file cannot be read: {error}") from error
    shapes = {one.name: tuple(int(size) for size in reversed(one.shape)) for one in reader.tensors}
    is_narrow = any(one.tensor_type not in _PLAIN for one in reader.tensors)
    return Contents(shapes, "int8" if is_narrow else FULL, lambda: _read(path, reader))


def _read(path: Path, reader: GGUFReader) -> Iterator[tuple[str, Stored]]:
    for one in reader.tensors:
        try:
            values = dequantize(one.data, one.tensor_type)
        except (NotImplementedError, ValueError) as error:
            what = f"{one.name} is stored as {one.tensor_type.name}, which is not read: {error}"
            raise InvalidModel.at(path, what, "QUANTIZED") from error
        shape = tuple(int(size) for size in reversed(one.shape))
        own = np.require(values, requirements="W")  # plain ones are views of the file
        yield one.name, Stored(torch.from_numpy(own).reshape(shape))
