"""One encoder from every kind of file: the same identity where the values are the same, and the
values that transformers has."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Model

from encoder_service.model.loading import load
from encoder_service.model.qwen import Text
from tests import single_files
from zimage_core.errors import InvalidModel
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.wire.identities import encoder_identities

TOKENS = [1, 200, 7, 7, 42, 199, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the constants of the published encoder, which single files are read with."""
    return single_files.build_folder(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderFiles]:
    """Every kind, of one model."""
    at = tmp_path_factory.mktemp("files")
    plain = Path(shutil.copytree(folder / "text_encoder", at / "plain"))
    shutil.copy(folder / "tokenizer" / "tokenizer.json", plain)
    tokenizer = folder / "tokenizer"
    single = single_files.write_encoder(folder, at / "single.safetensors")
    return {
        "diffusers folder": EncoderFiles.of(folder),
        "plain folder": EncoderFiles.of(plain),
        "single file": EncoderFiles.of(single, tokenizer),
        "GGUF": EncoderFiles.of(write_gguf(folder, at / "F32.gguf", "F32"), tokenizer),
        "Q8_0": EncoderFiles.of(write_gguf(folder, at / "Q8_0.gguf", "Q8_0"), tokenizer),
        "Q4_0": EncoderFiles.of(write_gguf(folder, at / "Q4_0.gguf", "Q4_0"), tokenizer),
    }


def write_gguf(folder: Path, path: Path, kind: str, family: str = "qwen3") -> Path:
    """As llama.cpp's converter writes it, under the names of the library's own tables."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1_000_000.0)
    stored = gguf.GGMLQuantizationType[kind]
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        values: Any = tensor.float().numpy()
        full = name if name.startswith("model.") else f"model.{name}"
        known = names.get_name(full, try_suffixes=(".weight",))
        if values.ndim > 1 and kind != "F32":
            writer.add_tensor(known, gguf.quants.quantize(values, stored), raw_dtype=stored)
        else:
            writer.add_tensor(known, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["diffusers folder", "plain folder", "single file", "GGUF"])
def test_the_same_values_are_the_same_encoder(
    files: dict[str, EncoderFiles], folder: Path, tmp_path: Path, kind: str
) -> None:
    identities = encoder_identities(files[kind], tmp_path / "one")
    assert identities == encoder_identities(files["diffusers folder"], tmp_path / "other")
    reference: Any = Qwen3Model.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        whole = reference(torch.tensor([TOKENS]), output_hidden_states=True)
    expected = whole.hidden_states[-2][0]
    encoder = load(files[kind], -2, "cpu", "float32")
    [run] = encoder([Text(TOKENS, ((-2, 1.0),))])
    torch.testing.assert_close(run.state, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_what_lost_something_is_another_encoder_and_computes_what_is_left(
    files: dict[str, EncoderFiles], tmp_path: Path, kind: str
) -> None:
    one = encoder_identities(files[kind], tmp_path / "one")
    other = encoder_identities(files["diffusers folder"], tmp_path / "other")
    assert one.keys() == other.keys()
    assert not set(one.values()) & set(other.values())
    stored = gguf.GGMLQuantizationType[kind]
    exact = load(files["diffusers folder"], -2, "cpu", "float32")
    lossy = load(files[kind], -2, "cpu", "float32")
    for name, value in exact.state_dict().items():
        meant = value.numpy()
        if meant.ndim > 1:
            meant = gguf.quants.dequantize(gguf.quants.quantize(meant, stored), stored)
        torch.testing.assert_close(lossy.state_dict()[name], torch.from_numpy(meant))


def test_other_families_and_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    foreign = write_gguf(folder, tmp_path / "foreign.gguf", "F32", family="llama")
    with pytest.raises(InvalidModel, match="llama model; Z-Image's text encoder is qwen3"):
        load(EncoderFiles.of(foreign, folder / "tokenizer"), -2, "cpu", "auto")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(foreign.read_bytes()[:1000])
    with pytest.raises(InvalidModel, match="this GGUF file cannot be read"):
        load(EncoderFiles.of(cut, folder / "tokenizer"), -2, "cpu", "auto")
