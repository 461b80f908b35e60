"""Transformers in a safetensors file of ComfyUI's: plain, or with a byte for each number of the
large weights and the scales beside them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dit_service.model.stored import Contents, Stored
from zimage_core.errors import InvalidModel
from zimage_core.formats.weights import Weight, read_whole
from zimage_core.planning.memory import FULL

_PLAIN = {"F32", "BF16", "F16"}
_NARROW = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_WEIGHT, _SCALES = ".weight", (".weight_scale", ".scale_weight")
_QUANTIZATION = ".comfy_quant"
_UNUSED = (".input_scale", ".scale_input", _QUANTIZATION, "scaled_fp8")
"""Scales of activations, which are measured here while they are there, and notes about formats."""


def contents(path: Path) -> Contents:
    """Raises InvalidModel for a file whose numbers are stored in a way that is not known here."""
    tensors, metadata = read_whole(path)
    for layer, quantization in _quantizations(path, tensors, metadata):
        _check_format(path, layer, quantization)
    for name, weight in tensors.items():
        if not name.endswith((*_SCALES, *_UNUSED)):
            _check_type(path, name, weight, tensors)
    shapes = {
        name: weight.shape
        for name, weight in tensors.items()
        if not name.endswith((*_SCALES, *_UNUSED))
    }
    forms = {_NARROW.get(tensors[name].element_type, FULL) for name in shapes if _is_large(name)}
    form = forms.pop() if len(forms) == 1 else FULL  # some were left as they were on purpose
    return Contents(shapes, form, lambda: _read(path, shapes))


def _is_large(name: str) -> bool:
    """Whether it is a weight of those that are narrow in such files, by ComfyUI's names."""
    is_linear = ".attention." in name or ".feed_forward." in name
    return is_linear and name.endswith(_WEIGHT) and "_norm." not in name


def _read(path: Path, names: Mapping[str, object]) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            there = set(tensors.keys())
            for name in names:
                scale = next((one for one in _scale_names(name) if one in there), None)
                yield (
                    name,
                    Stored(
                        tensors.get_tensor(name),
                        None if scale is None else tensors.get_tensor(scale),
                    ),
                )
    except SafetensorError as error:
        raise InvalidModel.at(path, f"the weights cannot be read: {error}") from error


def _scale_names(name: str) -> list[str]:
    layer = name.removesuffix(_WEIGHT)
    return [layer + suffix for suffix in _SCALES] if layer != name else []


def _quantizations(
    path: Path, tensors: Mapping[str, Weight], metadata: Mapping[str, str]
) -> Iterator[tuple[str, object]]:
    """What the file says of its layers, in one of two places."""
    try:
        for name, weight in tensors.items():
            if name.endswith(_QUANTIZATION):
                yield name.removesuffix(_QUANTIZATION), json.loads(bytes(weight.data))
        noted = json.loads(metadata.get("_quantization_metadata", "{}"))
        yield from noted.get("layers", {}).items()
    except (ValueError, AttributeError) as error:
        what = f"what it says of its quantized weights is malformed: {error}"
        raise InvalidModel.at(path, what) from error


def _check_format(path: Path, layer: str, quantization: object) -> None:
    given = quantization if isinstance(quantization, dict) else {}
    if given.get("format") in _FORMATS and not given.get("convrot"):
        return
    what = (
        f"{layer} is quantized as {json.dumps(quantization)}; what is read is "
        f"{', '.join(_FORMATS)}, without rotation"
    )
    raise InvalidModel.at(path, what, "QUANTIZED")


def _check_type(path: Path, name: str, weight: Weight, tensors: Mapping[str, Weight]) -> None:
    if weight.element_type not in _PLAIN and weight.element_type not in _NARROW:
        allowed = ", ".join(sorted(_PLAIN | _NARROW.keys()))
        what = f"{name} is stored as {weight.element_type}; what is read is {allowed}"
        raise InvalidModel.at(path, what, "QUANTIZED")
    scale = next((tensors[one] for one in _scale_names(name) if one in tensors), None)
    if weight.element_type in _PLAIN:
        if scale is not None:
            what = f"{name} is stored as {weight.element_type}, and has a scale beside it"
            raise InvalidModel.at(path, what, "QUANTIZED")
        return
    if len(weight.shape) != 2:
        what = f"{name} is stored as {weight.element_type}: only of matrices that is read"
        raise InvalidModel.at(path, what, "QUANTIZED")
    rows = weight.shape[0]
    sizes = {(), (1,), (1, 1), (rows,), (rows, 1)}
    if scale is not None and scale.shape not in sizes:
        what = f"the scales of {name} are {list(scale.shape)}: one, or one for each row, is read"
        raise InvalidModel.at(path, what, "QUANTIZED")
    has_scales = any(other.endswith(_SCALES) for other in tensors)
    if scale is None and (has_scales or weight.element_type == "I8"):
        what = f"{name} is stored as {weight.element_type}, and its scale is missing"
        raise InvalidModel.at(path, what, "QUANTIZED")
