"""Model folders: every layout of the weights loads alike, and what is wrong is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file

from dit_service.model.loading import (
    SchedulerConfig,
    load_transformer,
    load_vae,
    read_scheduler,
)
from zimage_core.errors import InvalidModel

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    return copy


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != ...}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def shard(folder: Path) -> None:
    """Spreads the weights over two files with an index, as large models come."""
    weights = load_file(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).unlink()
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: weight for name, weight in weights.items() if files[name] == file}
        save_file(part, folder / "transformer" / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_every_weight_is_the_files(folder: Path) -> None:
    loaded = load_transformer(folder, CPU, torch.float32).state_dict()
    stored = load_file(folder / "transformer" / WEIGHTS)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in stored.items())


def test_shards_in_float32_become_bfloat16(folder: Path) -> None:
    stored = load_file(folder / "transformer" / WEIGHTS)
    shard(folder)
    transformer = load_transformer(folder, CPU, torch.bfloat16)
    assert transformer.dtype == torch.bfloat16
    loaded = transformer.state_dict()
    assert all(torch.equal(loaded[name], stored[name].bfloat16()) for name in stored)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_the_file_is_not_needed_afterwards(folder: Path) -> None:
    transformer = load_transformer(folder, CPU, torch.float32)
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(before[name], w) for name, w in transformer.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "reason", "words"),
    [
        (shutil.rmtree, "FILE_MISSING", ["no such model folder"]),
        (
            lambda folder: edit_json(folder / "model_index.json", _class_name="FluxPipeline"),
            "FOREIGN_MODEL",
            ["FluxPipeline", "ZImagePipeline"],
        ),
        (
            lambda folder: edit_json(
                folder / "transformer" / "config.json", _class_name="FluxTransformer2DModel"
            ),
            "FOREIGN_MODEL",
            ["FluxTransformer2DModel", "ZImageTransformer2DModel"],
        ),
        (
            lambda folder: edit_json(folder / "transformer" / "config.json", siglip_feat_dim=1152),
            "FOREIGN_MODEL",
            ["Omni"],
        ),
        (
            lambda folder: edit_json(folder / "transformer" / "config.json", axes_lens=...),
            "CONFIG_INCOMPLETE",
            ["axes_lens"],
        ),
        (
            lambda folder: edit_json(folder / "transformer" / "config.json", dim="wide"),
            "CONFIG_MALFORMED",
            ["wide"],
        ),
        (
            lambda folder: edit_json(folder / "transformer" / "config.json", axes_dims=[16, 16, 8]),
            "CONFIG_MALFORMED",
            ["4 heads of 40", "192"],
        ),
        (
            lambda folder: edit_json(folder / "transformer" / "config.json", cap_feat_dim=96),
            "WEIGHTS_MISSHAPEN",
            ["cap_embedder.0.weight", "[128]", "[96]"],
        ),
        (
            lambda folder: (folder / "transformer" / "config.json").write_text("{"),
            "FILE_CORRUPT",
            ["config.json"],
        ),
        (
            lambda folder: (folder / "transformer" / "config.json").unlink(),
            "FILE_MISSING",
            ["config.json"],
        ),
        (
            lambda folder: (folder / "transformer" / WEIGHTS).unlink(),
            "FILE_MISSING",
            [WEIGHTS],
        ),
        (
            lambda folder: (folder / "transformer" / WEIGHTS).write_bytes(b"\x10garbage"),
            "FILE_CORRUPT",
            [WEIGHTS],
        ),
        (
            lambda folder: edit_weights(folder, lambda weights: weights.pop("x_pad_token")),
            "WEIGHTS_MISSING",
            ["x_pad_token"],
        ),
        (
            lambda folder: edit_weights(
                folder, lambda weights: weights.update(stray=torch.zeros(1))
            ),
            "WEIGHTS_UNKNOWN",
            ["stray"],
        ),
        (
            lambda folder: (shard(folder), (folder / "transformer/part-1.safetensors").unlink()),
            "FILE_MISSING",
            ["part-1.safetensors"],
        ),
        (
            lambda folder: (folder / f"transformer/{WEIGHTS}.index.json").write_text("{}"),
            "FILE_CORRUPT",
            ["weight_map"],
        ),
    ],
)
def test_a_wrong_transformer_is_named(
    folder: Path, spoil: Callable[[Path], object], reason: str, words: list[str]
) -> None:
    spoil(folder)
    with pytest.raises(InvalidModel) as caught:
        load_transformer(folder, CPU, torch.float32)
    assert caught.value.reason == reason
    assert str(folder) in caught.value.message
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vae_decodes_as_diffusers_does(folder: Path, dtype: torch.dtype) -> None:
    """To the bit, with the channels of a pixel side by side there, too: in the other order sums are
    others, which bfloat16 shows in the pixels and float32 does not."""
    latents_CHW = torch.randn(16, 6, 10, generator=torch.Generator().manual_seed(0)) * 3
    vae = load_vae(folder, CPU, dtype)
    reference = AutoencoderKL.from_pretrained(
        folder / "vae", torch_dtype=dtype, low_cpu_mem_usage=False
    )
    with torch.inference_mode():
        scaled = latents_CHW[None].to(dtype) / reference.config.scaling_factor
        scaled = scaled + reference.config.shift_factor
        plain = reference.decode(scaled, return_dict=False)[0]
        side_by_side = reference.to(memory_format=torch.channels_last)
        image = side_by_side.decode(scaled, return_dict=False)[0]
    [expected], [other] = (VaeImageProcessor().postprocess(one, "pil") for one in (image, plain))
    picture_HW3, is_finite = vae.decode(latents_CHW)
    assert is_finite
    assert vae.factor == 8
    assert picture_HW3.dtype == torch.uint8
    ours = picture_HW3.numpy()
    np.testing.assert_array_equal(ours, np.asarray(expected))
    if dtype == torch.float32:
        np.testing.assert_array_equal(ours, np.asarray(other))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: edit_json(folder / "vae" / "config.json", _class_name="AutoencoderTiny"),
        lambda folder: (folder / "vae" / WEIGHTS).write_bytes(b"garbage"),
        lambda folder: shutil.rmtree(folder / "vae"),
        lambda folder: edit_json(folder / "vae" / "config.json", latent_channels=4),
    ],
    ids=["foreign", "corrupt", "missing", "misshapen"],
)
def test_a_wrong_vae_is_named(folder: Path, spoil: Callable[[Path], object]) -> None:
    spoil(folder)
    with pytest.raises(InvalidModel, match=str(folder / "vae")):
        load_vae(folder, CPU, torch.float32)


def test_scheduler(folder: Path) -> None:
    assert read_scheduler(folder) == SchedulerConfig(shift=3.0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"shift_terminal": 0.02}, "shift_terminal"),
        ({"shift": ...}, "shift"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
    ],
)
def test_another_schedule_is_refused_by_name(
    folder: Path, changes: dict[str, Any], word: str
) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(InvalidModel, match=word):
        read_scheduler(folder)
