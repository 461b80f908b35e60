"""float16 for GPUs without bfloat16: a trained model's values do not fit it, its pictures do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_service.engine.device import choose_type, choose_vae_type
from dit_service.model import blocks
from dit_service.model.loading import load_transformer
from dit_service.model.transformer import Sample, ZImageTransformer

CPU = torch.device("cpu")
TOO_LARGE = 5e5
"""What both parts of a block give at their largest, here: seven times what float16 holds."""


def _velocities(model: ZImageTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, model.config.cap_feat_dim, generator=generator)
    [caption] = model.encode_captions([features])
    [moment] = model.modulate(torch.tensor([0.3]))
    latents = torch.randn(model.config.in_channels, 16, 16, generator=generator)
    layout = model.layout([model.shape_of(latents, caption)])
    [velocity] = model([Sample(latents, caption, moment)], layout)
    return velocity.float()


def _enlarge(model: ZImageTransformer) -> None:
    """Weights behind which a norm stands: how large they are changes no picture."""
    for stack in (model.noise_refiner, model.context_refiner, model.layers):
        for block in stack:
            for before, last in (
                ("attention.to_v", "attention.to_out.0"),
                ("feed_forward.w3", "feed_forward.w2"),
            ):
                module = block.get_submodule(last)
                largest: list[float] = []
                hook = module.register_forward_hook(
                    lambda _m, _i, out, seen=largest: seen.append(float(out.abs().max()))
                )
                _velocities(model)
                hook.remove()
                factor = (TOO_LARGE / max(largest)) ** 0.5
                module.weight.mul_(factor)
                block.get_submodule(before).weight.mul_(factor)


@torch.inference_mode()
def test_values_that_float16_cannot_hold_do_no_harm(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_transformer(model_folder, CPU, torch.float32)
    usual = _velocities(model)
    _enlarge(model)
    exact = _velocities(model)
    assert (exact - usual).abs().max() <= 1e-3 * usual.abs().max()
    ours = _velocities(model.half())
    assert (ours - exact).abs().max() <= 0.02 * exact.abs().max()
    monkeypatch.setattr(blocks, "_FLOAT16_SHARE", 1.0)
    assert not _velocities(model).isfinite().all(), "or this test shows nothing"


def test_the_vae_keeps_its_range() -> None:
    assert choose_type("float16", CPU) == torch.float16
    assert choose_vae_type("float16", CPU) == torch.float32
    assert choose_vae_type("auto", CPU) == torch.float32
    assert choose_vae_type("bfloat16", CPU) == torch.bfloat16
