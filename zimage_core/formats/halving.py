"""Float32 files whose values are bfloat16's, as some models are published: half the bytes hold as
much."""

from pathlib import Path

from zimage_core.formats import weights
from zimage_core.formats.weight_digest import as_bfloat16, chunks, is_bfloat16
from zimage_core.formats.weights import ELEMENT_BYTES, Weight

_WIDE, _NARROW = "F32", "BF16"


def halve(path: Path, to: Path) -> bool:
    """Writes the file with every tensor narrow that loses nothing by it; False, and no file, where
    there is none."""
    tensors, metadata = weights.read_whole(path)
    narrow = {name for name, weight in tensors.items() if _is_narrow(weight)}
    if not narrow:
        return False
    described: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, weight in tensors.items():
        kind = _NARROW if name in narrow else weight.element_type
        begin, end = (
            end,
            end + len(weight.data) // ELEMENT_BYTES[weight.element_type] * (ELEMENT_BYTES[kind]),
        )
        described[name] = {
            "dtype": kind,
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
    with to.open("wb") as file:
        file.write(weights.header(described))
        for name, weight in tensors.items():
            for chunk in chunks(weight):
                file.write(as_bfloat16(bytes(chunk)) if name in narrow else chunk)
    return True


def _is_narrow(weight: Weight) -> bool:
    return weight.element_type == _WIDE and all(
        is_bfloat16(bytes(chunk)) for chunk in chunks(weight)
    )
