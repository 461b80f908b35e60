"""E2: whole pictures against diffusers' ZImagePipeline, pixel by pixel."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dit_service import messages
from dit_service.engine.generate import Studio
from dit_service.model import loading
from zimage_client._embedded.stack import demo_model
from zimage_core.planning import schedule
from zimage_core.tensors import TensorData

SEED = 11
PROMPT = "a red circle on a blue background, in more words than fit into 32 tokens"
NEGATIVE = "blurry"
LARGEST_DIFFERENCE = 1  # of 255


def _pipeline(folder: Path) -> Any:
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generator(folder: Path) -> Studio:
    cpu = torch.device("cpu")
    return Studio(
        loading.load_transformer(folder, cpu, torch.float32),
        loading.load_vae(folder, cpu, torch.float32),
        "sdpa",
        announce=lambda _what, _seconds: None,
    )


def _embedding(pipeline: Any, text: str) -> TensorData:
    [features], _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    return TensorData("float32", tuple(features.shape), features.detach().numpy().tobytes())


def _ours(folder: Path, request: messages.Generate) -> list[np.ndarray]:
    events: list[object] = []
    with torch.inference_mode():
        _generator(folder).run(request, events.append)
    size = (request.height_px, request.width_px, 3)
    return [
        np.frombuffer(event.rgb, np.uint8).reshape(size)
        for event in events
        if isinstance(event, messages.Picture)
    ]


def _theirs(pipeline: Any, request: messages.Generate, **options: Any) -> list[np.ndarray]:
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    pictures = pipeline(
        PROMPT,
        height=request.height_px,
        width=request.width_px,
        num_inference_steps=len(request.sigmas) - 1,
        num_images_per_prompt=len(seeds),
        generator=seeds,
        guidance_scale=request.guidance,
        **options,
    ).images
    return [np.asarray(picture) for picture in pictures]


def _assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.std() > 1, "a flat picture proves nothing"
        difference = np.abs(one.astype(int) - other.astype(int)).max()
        assert difference <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(("width_px", "height_px"), [(128, 128), (80, 144)])
def test_turbo(model_folder: Path, width_px: int, height_px: int) -> None:
    pipeline = _pipeline(model_folder)
    request = messages.Generate(
        positive=_embedding(pipeline, PROMPT),
        negative=None,
        seeds=(SEED, SEED + 1),
        width_px=width_px,
        height_px=height_px,
        sigmas=schedule.sigmas(schedule.OFFICIAL, 8, 3.0),
        guidance=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        is_solo=True,
    )
    _assert_same(_ours(model_folder, request), _theirs(pipeline, request))


@pytest.mark.parametrize(
    ("guidance", "normalization", "truncation"),
    [(2.5, 0.0, 1.0), (4.0, 1.0, 1.0), (4.0, 0.7, 0.55), (0.0, 0.0, 1.0)],
)
def test_base(base_folder: Path, guidance: float, normalization: float, truncation: float) -> None:
    pipeline = _pipeline(base_folder)
    request = messages.Generate(
        positive=_embedding(pipeline, PROMPT),
        negative=_embedding(pipeline, NEGATIVE) if guidance else None,
        seeds=(SEED,),
        width_px=128,
        height_px=96,
        sigmas=schedule.sigmas(schedule.OFFICIAL, 12, 6.0),
        guidance=guidance,
        cfg_normalization=normalization,
        cfg_truncation=truncation,
        is_solo=True,
    )
    theirs = _theirs(
        pipeline,
        request,
        negative_prompt=NEGATIVE,
        cfg_normalization=normalization,
        cfg_truncation=truncation,
    )
    _assert_same(_ours(base_folder, request), theirs)


def test_what_peft_trained_changes_the_picture_as_in_diffusers(tmp_path: Path) -> None:
    folder = demo_model()
    pipeline = _pipeline(folder)
    request = messages.Generate(
        positive=_embedding(pipeline, PROMPT),
        negative=None,
        seeds=(SEED,),
        width_px=128,
        height_px=128,
        sigmas=schedule.sigmas(schedule.OFFICIAL, 8, pipeline.scheduler.config.shift),
        guidance=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        is_solo=True,
    )
    before = _theirs(pipeline, request)
    _train(pipeline)
    pipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    [file] = tmp_path.glob("*.safetensors")
    theirs = _theirs(pipeline, request)
    assert np.abs(theirs[0].astype(int) - before[0].astype(int)).mean() > 10
    use = messages.AdapterUse("trained", file.stat().st_size, file, 1.0)
    _assert_same(_ours(folder, replace(request, adapters=(use,))), theirs)


def _train(pipeline: Any) -> None:
    """A few steps towards a picture that is white above and black below."""
    transformer, vae = pipeline.transformer, pipeline.vae
    targets = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=12, target_modules=targets))
    with torch.no_grad():
        picture = torch.linspace(1, -1, 2).repeat_interleave(64).view(1, 1, 128, 1)
        mean = vae.encode(picture.expand(1, 3, 128, 128)).latent_dist.mean
        target = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        [words], _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    trained = [one for one in transformer.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        noise, time = torch.randn(target.shape, generator=generator), torch.rand(1)
        mixed = time * target + (1 - time) * noise
        [velocity] = transformer([mixed[0].unsqueeze(1)], time, [words], return_dict=False)[0]
        ((target - noise)[0] - velocity.squeeze(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("step_count", "shift"), [(8, 3.0), (9, 3.0), (50, 6.0), (1, 3.0)])
def test_schedule(model_folder: Path, step_count: int, shift: float) -> None:
    scheduler = _pipeline(model_folder).scheduler
    scheduler.set_shift(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / step_count, step_count))
    ours = schedule.sigmas(schedule.OFFICIAL, step_count, shift)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
