"""E8: adapters of every layout against weights that were changed by hand, and against diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import save_file

from dit_service.model.adapter_loading import load_adapter
from dit_service.model.adapters import Use, Uses
from dit_service.model.loading import load_transformer
from dit_service.model.transformer import Sample, ZImageTransformer
from dit_service.training.lora import Lora as LearntLora
from dit_service.training.lora import halves
from dit_service.training.training import Training
from tests import adapter_files
from tests.adapter_files import LAYOUTS, Lora
from zimage_core.planning.linears import block_linears, linears
from zimage_core.planning.training import LoraGroup, TrainingPlan, targets

CPU, FLOAT = torch.device("cpu"), torch.float32
TOLERANCE = 1e-5  # of the reference's largest absolute value


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder, CPU, FLOAT)


def _theirs(folder: Path, *changed_by: tuple[Lora, float]) -> Any:
    model = ZImageTransformer2DModel.from_pretrained(
        folder / "transformer", low_cpu_mem_usage=False
    ).eval()
    for lora, scale in changed_by:
        for name in lora.halves:
            model.get_submodule(name).weight.data += scale * lora.delta(name)
    return model


def _forward(model: ZImageTransformer, *samples: tuple[int, Uses]) -> list[torch.Tensor]:
    """Samples of so many prompt tokens, each with its own adapters."""
    made = []
    for tokens, uses in samples:
        latents, features = _inputs(model, tokens)
        [caption] = model.encode_captions([features], adapters=uses)
        [moment] = model.modulate(torch.tensor([0.3]), uses)
        made.append(Sample(latents, caption, moment, uses))
    layout = model.layout([model.shape_of(one.latents_CHW, one.caption) for one in made])
    velocities: list[torch.Tensor] = model(made, layout)
    return velocities


def _inputs(model: ZImageTransformer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(16, 8 + tokens % 3 * 2, 10, generator=generator),
        torch.randn(tokens, model.config.cap_feat_dim, generator=generator),
    )


def _reference(theirs: Any, model: ZImageTransformer, tokens: int) -> torch.Tensor:
    latents, features = _inputs(model, tokens)
    [velocity] = theirs([latents.unsqueeze(1)], torch.tensor([0.3]), [features], return_dict=False)[
        0
    ]
    result: torch.Tensor = velocity.squeeze(1)
    return result


def _assert_close(given: torch.Tensor, reference: torch.Tensor) -> None:
    assert (given - reference).abs().max() <= TOLERANCE * reference.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_layout_means_the_same(
    layout: str, ours: ZImageTransformer, model_folder: Path, tmp_path: Path
) -> None:
    lora = adapter_files.random_lora(linears(ours.config))
    path = adapter_files.write(tmp_path / "some.safetensors", lora, layout)
    use = Use(load_adapter(path, ours.config, CPU, FLOAT), 0.7)
    [velocity] = _forward(ours, (40, (use,)))
    reference = _reference(_theirs(model_folder, (lora, 0.7)), ours, 40)
    _assert_close(velocity, reference)
    [without] = _forward(ours, (40, ()))
    assert (velocity - without).abs().max() > 100 * TOLERANCE * reference.abs().max()


LOADED_EXACTLY = [
    "transformer, settings",
    "transformer, baked",
    "diffusion_model, alpha",
    "diffusion_model, baked",
    "diffusion_model, settings",
    "diffusion_model, down and up",
    "kohya",
    "kohya, fused",
]
"""By diffusers; the others it refuses, or reads with another strength or in part."""


@pytest.mark.parametrize("layout", LOADED_EXACTLY)
@torch.inference_mode()
def test_diffusers_reads_the_same_of_it(
    layout: str, ours: ZImageTransformer, model_folder: Path, tmp_path: Path
) -> None:
    in_blocks = {
        name: sizes
        for name, sizes in linears(ours.config).items()
        if ".attention." in name or ".feed_forward." in name
    }
    path = adapter_files.write(
        tmp_path / "some.safetensors", adapter_files.random_lora(in_blocks), layout
    )
    pipeline = ZImagePipeline.from_pretrained(model_folder, dtype=FLOAT)
    pipeline.load_lora_weights(path, adapter_name="some")
    pipeline.set_adapters("some", 0.7)
    use = Use(load_adapter(path, ours.config, CPU, FLOAT), 0.7)
    [velocity] = _forward(ours, (40, (use,)))
    _assert_close(velocity, _reference(pipeline.transformer, ours, 40))


@torch.no_grad()
def test_what_a_training_writes_diffusers_and_we_read_alike(
    ours: ZImageTransformer, model_folder: Path, tmp_path: Path
) -> None:
    group = LoraGroup("layers", 0, 2, tuple(block_linears(ours.config)), rank=4, alpha=6.0)
    changed = targets((group,), ours.config)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: 0.05 * torch.randn(size, generator=generator)
        for name, size in halves(changed).items()
    }
    state = {f"weights/{name}": weight for name, weight in weights.items()}
    training = Training(ours, "sdpa", TrainingPlan(0, 1, (group,)), state)
    path = tmp_path / "learnt.safetensors"
    save_file(dict(training.file_tensors(FLOAT)), path)
    learnt = LearntLora(changed, ours, 0, weights).uses(weights)
    [velocity] = _forward(ours, (40, learnt))
    use = Use(load_adapter(path, ours.config, CPU, FLOAT), 1.0)
    _assert_close(_forward(ours, (40, (use,)))[0], velocity)
    pipeline = ZImagePipeline.from_pretrained(model_folder, dtype=FLOAT)
    pipeline.load_lora_weights(path)
    _assert_close(_reference(pipeline.transformer, ours, 40), velocity)
    [without] = _forward(ours, (40, ()))
    assert (velocity - without).abs().max() > 100 * TOLERANCE * velocity.abs().max()


@torch.inference_mode()
def test_samples_of_one_call_have_adapters_of_their_own(
    ours: ZImageTransformer, model_folder: Path, tmp_path: Path
) -> None:
    every = linears(ours.config)
    loras = [adapter_files.random_lora(every, rank, seed=rank) for rank in (2, 16)]
    loaded = [
        load_adapter(
            adapter_files.write(tmp_path / f"{lora.rank}.safetensors", lora, "peft"),
            ours.config,
            CPU,
            FLOAT,
        )
        for lora in loras
    ]
    wishes = [(33, ()), (7, (0.8, 0.0)), (7, (0.8, 0.0)), (64, (0.0, -0.5)), (40, (0.3, 0.9))]
    samples = []
    for tokens, scales in wishes:
        uses = zip(loaded, scales, strict=False)
        samples.append((tokens, tuple(Use(one, scale) for one, scale in uses if scale)))
    for velocity, (tokens, scales) in zip(_forward(ours, *samples), wishes, strict=True):
        theirs = _theirs(model_folder, *zip(loras, scales, strict=False))
        _assert_close(velocity, _reference(theirs, ours, tokens))
