"""E2: whole pictures against diffusers' ZImagePipeline, pixel by pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from dit_service import messages
from dit_service.engine.generate import Studio
from dit_service.model import loading
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


@pytest.mark.parametrize(("step_count", "shift"), [(8, 3.0), (9, 3.0), (50, 6.0), (1, 3.0)])
def test_schedule(model_folder: Path, step_count: int, shift: float) -> None:
    scheduler = _pipeline(model_folder).scheduler
    scheduler.set_shift(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / step_count, step_count))
    ours = schedule.sigmas(schedule.OFFICIAL, step_count, shift)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
