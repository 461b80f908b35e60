"""Transformers in files of few bits, as owners of small cards have them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_service.model.loading import Residence, load_transformer, read_config
from tests import single_files
from zimage_core.errors import InvalidModel

CPU, FLOAT = torch.device("cpu"), torch.float32
OUT = "layers.1.attention.out"
FLOATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A transformer by ComfyUI's names."""
    folder = tmp_path_factory.mktemp("narrow")
    model = single_files.build_folder(folder / "folder")
    return load_file(single_files.write_transformer(model, folder / "plain.safetensors"))


def _is_large(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and (".attention." in name or ".feed_forward." in name)


def _write(
    plain: dict[str, Tensor], path: Path, kind: torch.dtype, layout: str
) -> dict[str, Tensor]:
    """Writes large weights narrow, in one of the layouts that there are; returns what they mean."""
    stored, meant, formats = {}, {}, {}
    for name, weight in plain.items():
        stored[name] = meant[name] = weight
        if not _is_large(name, weight):
            continue
        layer = name.removesuffix(".weight")
        largest = 127.0 if kind == torch.int8 else torch.finfo(kind).max
        by_row = weight.abs().amax(1, keepdim=True)
        scale = {"rows": by_row, "bare": torch.tensor(largest)}.get(layout, weight.abs().max())
        scale = scale / largest
        values = weight / scale
        stored[name] = (values.round() if kind == torch.int8 else values).to(kind)
        meant[name] = stored[name].float() * scale
        formats[layer] = {"format": FLOATS.get(kind, "int8_tensorwise")}
        if layout == "old":
            stored[f"{layer}.scale_weight"] = scale
            stored[f"{layer}.scale_input"] = torch.tensor(1.0)
        elif layout != "bare":
            stored[f"{layer}.weight_scale"] = scale
        if layout == "noted":
            text = json.dumps(formats[layer]).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if layout == "old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=kind)
    note = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}
    save_file(stored, path, note if layout == "rows" else None)
    return meant


def _loaded(path: Path, form: str) -> dict[str, Tensor]:
    """Weights by ComfyUI's names; what narrow ones stand for."""
    state = load_transformer(path, CPU, FLOAT, Residence(form)).state_dict()
    found = {}
    for name, weight in state.items():
        scale = state.get(name.removesuffix("weight") + "scale_O1")
        if not name.endswith("scale_O1"):
            found[name] = weight if scale is None else weight.float() * scale
    return found


def _by_our_names(meant: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    save_file(meant, path)
    return _loaded(path, "full")


@pytest.mark.parametrize(
    ("kind", "layout", "form"),
    [
        (torch.float8_e4m3fn, "old", "fp8"),
        (torch.float8_e4m3fn, "noted", "fp8"),
        (torch.float8_e4m3fn, "rows", "fp8"),
        (torch.float8_e4m3fn, "bare", "fp8"),
        (torch.float8_e5m2, "old", "fp8"),
        (torch.int8, "rows", "int8"),
        (torch.int8, "noted", "int8"),
    ],
)
def test_what_the_file_means_is_what_is_loaded(
    plain: dict[str, Tensor], tmp_path: Path, kind: torch.dtype, layout: str, form: str
) -> None:
    path = tmp_path / "narrow.safetensors"
    meant = _by_our_names(_write(plain, path, kind, layout), tmp_path / "meant.safetensors")
    assert read_config(path)[1] == form
    for name, weight in _loaded(path, "full").items():
        assert torch.equal(weight, meant[name]), name
    for name, weight in _loaded(path, "auto").items():
        lost = (weight - meant[name]).abs().max() / meant[name].abs().max()
        assert lost <= (2**-16 if kind == torch.float8_e5m2 else 1e-6), name


@pytest.mark.parametrize(
    ("kind", "form", "allowed"),
    [("Q8_0", "int8", 0.01), ("Q4_0", "int8", 0.01), ("BF16", "full", 0)],
)
def test_gguf(
    plain: dict[str, Tensor], tmp_path: Path, kind: str, form: str, allowed: float
) -> None:
    """As city96's converter writes them: pad tokens without their first dimension, too."""
    path, quantized = tmp_path / "z.gguf", gguf.GGMLQuantizationType[kind]
    writer, meant = gguf.GGUFWriter(path, "lumina2"), {}
    for name, weight in plain.items():
        values = weight.squeeze(0).numpy()
        if _is_large(name, weight) and weight.shape[1] % 32 == 0:
            data = gguf.quants.quantize(values, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
            values = gguf.quants.dequantize(data, quantized).reshape(values.shape)
        else:
            writer.add_tensor(name, values.astype(np.float32))
        meant[name] = torch.from_numpy(values.copy()).reshape(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    exact = _by_our_names(meant, tmp_path / "meant.safetensors")
    assert read_config(path)[1] == form
    for name, weight in _loaded(path, "full").items():
        assert torch.equal(weight, exact[name]), name
    for name, weight in _loaded(path, "auto").items():
        lost = (weight - exact[name]).norm() / exact[name].norm().clamp(min=1e-9)
        assert lost <= allowed, name
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InvalidModel, match="this GGUF file cannot be read"):
        load_transformer(path, CPU, FLOAT)


def test_layers_that_were_left_as_they_are_stay_so(
    plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """The form is one for all: here that which loses nothing of any."""
    path = tmp_path / "mixed.safetensors"
    meant = _write(plain, path, torch.float8_e4m3fn, "old")
    meant[f"{OUT}.weight"] = plain[f"{OUT}.weight"]
    single_files.edit(
        path,
        **{
            f"{OUT}.weight": plain[f"{OUT}.weight"],
            f"{OUT}.scale_weight": None,
            f"{OUT}.scale_input": None,
        },
    )
    assert read_config(path)[1] == "full"
    exact = _by_our_names(meant, tmp_path / "meant.safetensors")
    assert all(torch.equal(weight, exact[name]) for name, weight in _loaded(path, "auto").items())


def _json(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({f"{OUT}.comfy_quant": _json('{"format": "nvfp4"}')}, "nvfp4.*float8_e4m3fn"),
        (
            {f"{OUT}.comfy_quant": _json('{"format": "int8_tensorwise", "convrot": true}')},
            "without rotation",
        ),
        ({f"{OUT}.comfy_quant": _json("{")}, "malformed"),
        ({f"{OUT}.comfy_quant": _json("[1]")}, r"\[1\]"),
        ({f"{OUT}.scale_weight": torch.ones(2, 2)}, r"scales of .* are \[2, 2\]"),
        ({f"{OUT}.scale_weight": None}, f"{OUT}.weight is stored as F8_E4M3, and its scale"),
        ({f"{OUT}.weight": torch.ones(256, 256, dtype=torch.uint8)}, "stored as U8"),
        ({f"{OUT}.weight_scale_2": torch.ones(1)}, "belongs to another model"),
        ({f"{OUT}.weight": torch.ones(256, 256)}, "stored as F32, and has a scale"),
        ({f"{OUT}.weight": torch.ones(256).to(torch.float8_e4m3fn)}, "only of matrices"),
        ({"layers.1.attention.qkv.weight": torch.ones(7, 256).to(torch.float8_e4m3fn)}, "7 rows"),
    ],
)
def test_what_is_not_understood_is_refused(
    plain: dict[str, Tensor], tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "narrow.safetensors"
    _write(plain, path, torch.float8_e4m3fn, "old")
    single_files.edit(path, **changes)
    with pytest.raises(InvalidModel, match=complaint):
        load_transformer(path, CPU, FLOAT)


def test_a_folder_with_narrow_weights_is_refused(tmp_path: Path) -> None:
    """Nobody writes such folders, and without scales they would mean something else."""
    folder = single_files.build_folder(tmp_path / "folder")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["layers.0.attention.to_q.weight"] = torch.ones(256, 256).to(torch.float8_e4m3fn)
    save_file(weights, path)
    with pytest.raises(InvalidModel, match=r"to_q\.weight is stored as"):
        load_transformer(folder, CPU, FLOAT)
