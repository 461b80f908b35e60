"""Safetensors files read without a tensor library: names, types, shapes and the bytes themselves.

A file is the header's length in eight bytes, the header in JSON, then the elements of all tensors.
"""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_core.errors import InvalidModel
from zimage_core.formats.json_object import parse_json_object, read_json_object

ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""The element types by the names of the format."""

_PLAIN = {"F32", "BF16", "F16"}
_SCALES = (".weight_scale", ".weight_scale_2", ".scale_weight", ".input_scale", ".scale_input")
"""How the names of the numbers end without which quantized weights mean nothing."""

_METADATA = "__metadata__"
_ALIGNMENT = 8
_SUFFIX = ".safetensors"
_INDEX = _SUFFIX + ".index.json"
_MOST_DIMENSIONS, _LARGEST_SIZE = 8, 2**48
_LONGEST_HEADER = 100_000_000
"""What the format's own library accepts."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor in a file; `data` is a view of the mapped file and keeps it mapped."""

    element_type: str
    shape: tuple[int, ...]
    data: memoryview


def files(folder: Path, stem: str = "*") -> tuple[Path, ...]:
    """The weight files of a folder: those that an index names, else all that lie there. A stem
    tells them from other variants beside them. A file is its own."""
    if folder.is_file():
        return (folder,)
    indexes = sorted(folder.glob(stem + _INDEX))
    if indexes:
        names = sorted(set(_weight_map(indexes[0]).values()))
        paths = tuple(_beside(indexes[0], str(name)) for name in names)
    else:
        paths = tuple(sorted(folder.glob(stem + _SUFFIX)))
    if not paths:
        what = f"no {stem}{_SUFFIX} here" if folder.is_dir() else "no such folder"
        raise InvalidModel.at(folder, what, "FILE_MISSING")
    for path in paths:
        if not path.is_file():
            what = f"{indexes[0].name} names this file, but it is missing"
            raise InvalidModel.at(path, what, "FILE_MISSING")
    return paths


def read_all(folder: Path) -> dict[str, Weight]:
    """All tensors of a folder, sharded or not, or of a file; nothing is read but the headers."""
    found: dict[str, Weight] = {}
    for path in files(folder):
        for name, weight in read_file(path):
            if name in found:
                raise InvalidModel.at(path, f"{name} stands in another file of the folder too")
            found[name] = weight
    return found


def read_file(path: Path) -> Iterator[tuple[str, Weight]]:
    """The tensors of one file; raises InvalidModel for a file that is not what it should be."""
    described, elements = _open(path)
    for name, entry in described.items():
        if name != _METADATA:
            yield name, _weight(path, name, entry, elements)


def read_whole(
    path: Path, longest_header: int = _LONGEST_HEADER
) -> tuple[dict[str, Weight], dict[str, str]]:
    """The tensors of one file, and what it says of itself; raises InvalidModel, too."""
    described, elements = _open(path, longest_header)
    metadata = described.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise InvalidModel.at(path, "its metadata is no JSON object")
    tensors = {name: _weight(path, name, entry, elements) for name, entry in described.items()}
    return tensors, {str(name): str(value) for name, value in metadata.items()}


def copy(path: Path, to: Path, metadata: Mapping[str, str]) -> None:
    """Writes a file that says more of itself."""
    described, elements = _open(path)
    described[_METADATA] = {**described.get(_METADATA, {}), **metadata}
    with to.open("wb") as file:
        file.write(header(described))
        file.write(elements)


def header(described: Mapping[str, Any]) -> bytes:
    """What stands in a file before the elements."""
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def refuse_quantized(path: Path, tensors: Mapping[str, Weight]) -> None:
    """Raises InvalidModel where a tensor is no plain float, or belongs to one that is none."""
    for name, weight in tensors.items():
        if weight.element_type not in _PLAIN or name.endswith(_SCALES):
            what = (
                f"{name} is stored as {weight.element_type}: quantized files are not supported; "
                "take the bf16 file"
            )
            raise InvalidModel.at(path, what, "QUANTIZED")


def _open(path: Path, longest_header: int = _LONGEST_HEADER) -> tuple[dict[str, Any], memoryview]:
    """The header, and the elements of all tensors."""
    with path.open("rb") as file:
        try:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError as error:  # an empty file cannot be mapped
            raise InvalidModel.at(path, "the file is empty") from error
    header_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header_bytes > len(content) - 8:
        raise InvalidModel.at(path, "not a safetensors file, or cut off within its header")
    if header_bytes > longest_header:
        what = f"its header has {header_bytes} bytes, {longest_header} at most are read"
        raise InvalidModel.at(path, what)
    described = parse_json_object(path, bytes(content[8 : 8 + header_bytes]))
    return described, content[8 + header_bytes :]


def _weight(path: Path, name: str, entry: Any, elements: memoryview) -> Weight:
    try:
        element_type, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        if len(shape) > _MOST_DIMENSIONS or not all(0 <= size < _LARGEST_SIZE for size in shape):
            raise ValueError
        expected = math.prod(shape) * ELEMENT_BYTES[element_type]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidModel.at(path, f"{name}: malformed or unknown entry {entry}") from error
    if not 0 <= begin <= end <= len(elements):
        raise InvalidModel.at(path, f"{name}: the file ends before this tensor does; it is cut off")
    if end - begin != expected:
        raise InvalidModel.at(
            path, f"{name}: {end - begin} bytes, but {expected} expected for {entry}"
        )
    return Weight(element_type, shape, elements[begin:end])


def _beside(index: Path, name: str) -> Path:
    if Path(name).name != name:
        what = f"it names {name!r}, which is no file beside it"
        raise InvalidModel.at(index, what, "FILE_OUTSIDE")
    return index.with_name(name)


def _weight_map(index: Path) -> Mapping[str, Any]:
    entries = read_json_object(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise InvalidModel.at(index, "no weight_map in this index")
    return entries
