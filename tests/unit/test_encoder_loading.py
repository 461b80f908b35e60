"""What the encoder's loader reads, chooses and refuses."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder_service.model.loading import choose_device, choose_type, load
from encoder_service.model.qwen import Text
from zimage_core.errors import InvalidModel, InvalidSettings, NotReady
from zimage_core.formats.encoder_files import EncoderFiles

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder / "text_encoder", tmp_path / "text_encoder"))


def files(folder: Path) -> EncoderFiles:
    return EncoderFiles(folder, folder / "tokenizer.json")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_only_what_is_needed_must_be_there(folder: Path) -> None:
    last = [name for name in load_file(folder / "model.safetensors") if ".2." in name]
    _edit_weights(folder, dict.fromkeys([*last, "norm.weight"]))
    assert len(load(files(folder), -2, "cpu", "auto").layers) == 2
    with pytest.raises(InvalidModel, match=r"no tensor layers\.2\."):
        load(files(folder), -1, "cpu", "auto")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_weights_are_held_in_the_type_that_was_asked_for(folder: Path, name: str) -> None:
    encoder = load(files(folder), -2, "cpu", name)
    assert {str(weight.dtype) for weight in encoder.parameters()} == {f"torch.{name}"}
    assert encoder([Text([1, 2, 3], ((-2, 1.0),))])[0].state.dtype == getattr(torch, name)


def test_another_family_is_refused_by_name(folder: Path) -> None:
    _edit_config(folder, model_type="t5")
    with pytest.raises(InvalidModel, match=r"t5 .* qwen3") as refusal:
        load(files(folder), -2, "cpu", "auto")
    assert refusal.value.reason == "FOREIGN_MODEL"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": 64}, "its config says"),
        ({"num_hidden_layers": "many"}, "its config is wrong"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"num_hidden_layers": 9, "layer_types": None}, r"no tensor layers\.3\."),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    folder: Path, changes: dict[str, Any], complaint: str
) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(InvalidModel, match=complaint):
        load(files(folder), -2, "cpu", "auto")


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_config_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InvalidModel, match=r"config\.json"):
        load(files(folder), -2, "cpu", "auto")


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidModel, match=r"no \*\.safetensors"):
        load(files(folder), -2, "cpu", "auto")
    (folder / "config.json").unlink()
    with pytest.raises(InvalidModel, match=r"config\.json: this file is missing"):
        load(files(folder), -2, "cpu", "auto")


def test_quantized_weights_are_refused(folder: Path) -> None:
    table = torch.zeros(261, 128, dtype=torch.float8_e4m3fn)
    _edit_weights(folder, {"embed_tokens.weight": table})
    with pytest.raises(InvalidModel, match="F8_E4M3"):
        load(files(folder), -2, "cpu", "auto")


@pytest.mark.parametrize("deepest", [0, -5])
def test_a_state_the_encoder_lacks_is_refused(folder: Path, deepest: int) -> None:
    with pytest.raises(InvalidSettings, match="max_hidden_layer"):
        load(files(folder), deepest, "cpu", "auto")


def test_tokens_of_another_models_tokenizer_are_refused(folder: Path) -> None:
    encoder = load(files(folder), -2, "cpu", "auto")
    with pytest.raises(NotReady, match="token 261 is not among the 261") as refusal:
        encoder([Text(ids, ((-2, 1.0),)) for ids in ([1, 2], [260, 261])])
    assert refusal.value.reason == "TOKENIZER_MISMATCH"


def test_a_device_that_is_not_here_is_refused() -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(InvalidSettings, match=absent):
        choose_device(absent)
    assert choose_device("cpu") == CPU


def test_type_of_choice() -> None:
    assert choose_type("float16", CPU, torch.float32) is torch.float16
    assert choose_type("auto", torch.device("cuda"), torch.float32) is torch.bfloat16
    assert choose_type("auto", CPU, torch.float32) is torch.float32
    assert choose_type("auto", CPU, torch.float16) is torch.float32
