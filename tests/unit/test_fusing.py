"""An adapter that is part of the weights: what it adds beside them, and nothing that stays."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_service.model.adapter_loading import load_adapter
from dit_service.model.adapters import Use, Uses
from dit_service.model.fusing import Fusion
from dit_service.model.loading import Residence, load_transformer, read_config
from dit_service.model.transformer import Sample, ZImageTransformer
from tests import adapter_files
from zimage_core.errors import InvalidSettings
from zimage_core.planning.linears import linears
from zimage_core.planning.memory import weight_bytes

CPU, FLOAT, SCALE = torch.device("cpu"), torch.float32, 0.7


@pytest.fixture
def lora(model_folder: Path, tmp_path: Path) -> Path:
    """On every linear there is, embedders and modulation included."""
    config, _ = read_config(model_folder)
    random = adapter_files.random_lora(linears(config), size=0.1)
    return adapter_files.write(tmp_path / "all.safetensors", random, "bare")


def _velocity(model: ZImageTransformer, uses: Uses = ()) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, model.config.cap_feat_dim, generator=generator)
    [caption] = model.encode_captions([features], adapters=uses)
    [moment] = model.modulate(torch.tensor([0.3]), uses)
    latents = torch.randn(model.config.in_channels, 16, 16, generator=generator)
    layout = model.layout([model.shape_of(latents, caption)])
    [velocity] = model([Sample(latents, caption, moment, uses)], layout)
    return velocity


@torch.inference_mode()
def test_it_adds_what_it_adds_beside_the_weights(model_folder: Path, lora: Path) -> None:
    plain = load_transformer(model_folder, CPU, FLOAT)
    fusion = Fusion.read(lora, SCALE, plain.config, CPU)
    fused = load_transformer(model_folder, CPU, FLOAT, fusion=fusion)
    beside = _velocity(plain, (Use(load_adapter(lora, plain.config, CPU, FLOAT), SCALE),))
    assert (_velocity(fused) - beside).abs().max() <= 1e-5 * beside.abs().max()
    assert (_velocity(plain) - beside).abs().max() > 0.1 * beside.abs().max()
    changed = [
        name
        for name, weight in plain.state_dict().items()
        if not torch.equal(weight, fused.state_dict()[name])
    ]
    assert set(changed) == {f"{name}.weight" for name in linears(plain.config)}


@torch.inference_mode()
def test_it_takes_turns_and_becomes_narrow_with_the_weights(model_folder: Path, lora: Path) -> None:
    config, _ = read_config(model_folder)
    fusion = Fusion.read(lora, SCALE, config, CPU)
    least = weight_bytes(config, 4).least
    exact = _velocity(load_transformer(model_folder, CPU, FLOAT, fusion=fusion))
    streamed = load_transformer(model_folder, CPU, FLOAT, Residence("full", least), fusion)
    assert torch.equal(_velocity(streamed), exact)
    narrow = _velocity(load_transformer(model_folder, CPU, FLOAT, Residence("int8"), fusion))
    assert 0 < (narrow - exact).norm() <= 0.02 * exact.norm()


def test_without_it_the_model_is_what_it_was(model_folder: Path, lora: Path) -> None:
    before = load_transformer(model_folder, CPU, FLOAT).state_dict()
    fusion = Fusion.read(lora, SCALE, read_config(model_folder)[0], CPU)
    load_transformer(model_folder, CPU, FLOAT, fusion=fusion)
    after = load_transformer(model_folder, CPU, FLOAT).state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("content", [None, b"no adapter"])
def test_what_is_no_adapter_is_refused_at_the_start(
    model_folder: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "none.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidSettings, match=r"fused_adapter .*none\.safetensors: "):
        Fusion.read(path, 1.0, read_config(model_folder)[0], CPU)
