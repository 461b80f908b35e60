"""E1: our transformer against diffusers' own, on the same weights."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from demo_model.random_model import Shape, build
from dit_service.model.diffusers_face import DiffusersFace
from dit_service.model.loading import load_transformer
from dit_service.model.transformer import Sample, ZImageTransformer

TOLERANCE = 1e-5  # of the reference's largest absolute value
LENGTHS = [1, 31, 32, 33, 200]
SIZES = [(16, 16), (24, 10), (30, 46)]  # latents; the last two need image pads
ODD = {"dim": 60, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [8, 6, 6], "cap_feat_dim": 40}


@dataclass(frozen=True)
class Pair:
    ours: ZImageTransformer
    theirs: Any

    def inputs(
        self, *samples: tuple[tuple[int, int], int]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(len(samples))
        config = self.ours.config
        latents = [torch.randn(16, *size, generator=generator) for size, _ in samples]
        features = [
            torch.randn(length, config.cap_feat_dim, generator=generator) for _, length in samples
        ]
        return latents, features, torch.linspace(0.05, 0.7, len(samples))


@pytest.fixture(scope="module", params=["demo", "odd"])
def pair(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder = model_folder
    if request.param == "odd":
        folder = tmp_path_factory.mktemp("models") / "odd"
        build(folder, Shape(transformer=Shape().transformer | ODD))
    transformer = load_transformer(folder, torch.device("cpu"), torch.float32)
    moved_by = request.config.getoption("--move-a-weight")
    transformer.get_parameter("layers.0.feed_forward.w2.weight")[3, 5] += moved_by
    return Pair(
        transformer,
        ZImageTransformer2DModel.from_pretrained(
            folder / "transformer", low_cpu_mem_usage=False
        ).eval(),
    )


def ours(
    model: ZImageTransformer, latents: list[Tensor], features: list[Tensor], times: Tensor
) -> list[Tensor]:
    captions = model.encode_captions(features)
    parts = zip(latents, captions, model.modulate(times), strict=True)
    samples = [Sample(*part) for part in parts]
    layout = model.layout([model.shape_of(s.latents_CHW, s.caption) for s in samples])
    return model(samples, layout)


def theirs(
    model: Any, latents: list[Tensor], features: list[Tensor], times: Tensor
) -> list[Tensor]:
    stacked = [latents_CHW.unsqueeze(1).to(model.dtype) for latents_CHW in latents]
    velocities = model(stacked, times, features, return_dict=False)[0]
    return [velocity.squeeze(1).float() for velocity in velocities]


def difference(one: Tensor, reference: Tensor) -> float:
    assert one.shape == reference.shape
    return float((one - reference).abs().max() / reference.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_single(pair: Pair, length: int, size: tuple[int, int]) -> None:
    inputs = pair.inputs((size, length))
    [velocity], [reference] = ours(pair.ours, *inputs), theirs(pair.theirs, *inputs)
    assert difference(velocity, reference) <= TOLERANCE


@torch.inference_mode()
def test_embedding_in_another_type(pair: Pair) -> None:
    """An encoder that computes in bfloat16 costs the transformer no precision of its own."""
    latents, features, times = pair.inputs((SIZES[0], 33))
    inputs = latents, [features_LF.bfloat16() for features_LF in features], times
    [velocity], [reference] = ours(pair.ours, *inputs), theirs(pair.theirs, *inputs)
    assert difference(velocity, reference) <= TOLERANCE


@torch.inference_mode()
def test_packed_equals_alone(pair: Pair) -> None:
    """Sizes, lengths and moments of every kind in one call."""
    latents, features, times = pair.inputs(
        *[(SIZES[i % len(SIZES)], length) for i, length in enumerate(LENGTHS)]
    )
    packed = ours(pair.ours, latents, features, times)
    for index, velocity in enumerate(packed):
        alone = (latents[index : index + 1], features[index : index + 1], times[index : index + 1])
        assert difference(velocity, ours(pair.ours, *alone)[0]) <= TOLERANCE
        assert difference(velocity, theirs(pair.theirs, *alone)[0]) <= TOLERANCE


@torch.inference_mode()
def test_shared_moment_equals_own_moments(pair: Pair) -> None:
    """Equal samples at one moment go the short ways: one modulation, one attention call."""
    latents, features, _ = pair.inputs((SIZES[0], 40), (SIZES[0], 50))
    captions = pair.ours.encode_captions(features)
    [moment] = pair.ours.modulate(torch.tensor([0.3]))
    samples = [Sample(x, c, moment) for x, c in zip(latents, captions, strict=True)]
    layout = pair.ours.layout([pair.ours.shape_of(s.latents_CHW, s.caption) for s in samples])
    references = ours(pair.ours, latents, features, torch.tensor([0.3, 0.3]))
    for velocity, reference in zip(pair.ours(samples, layout), references, strict=True):
        assert difference(velocity, reference) <= TOLERANCE


@torch.inference_mode()
def test_each_linear_runs_once_per_step(pair: Pair) -> None:
    model = pair.ours
    latents, features, times = pair.inputs(*[(size, 40) for size in SIZES])
    parts = zip(latents, model.encode_captions(features), model.modulate(times), strict=True)
    samples = [Sample(*part) for part in parts]
    layout = model.layout([model.shape_of(s.latents_CHW, s.caption) for s in samples])
    calls: Counter[str] = Counter()
    names = {module: name for name, module in model.named_modules()}
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.update([names[module]]))
        for module in names
        if isinstance(module, nn.Linear)
    ]
    model(samples, layout)
    for hook in hooks:
        hook.remove()
    once_per_prompt_or_schedule = ("cap_embedder", "context_refiner", "t_embedder")
    assert calls == Counter(
        name
        for module, name in names.items()
        if isinstance(module, nn.Linear)
        and not name.startswith(once_per_prompt_or_schedule)
        and "adaLN" not in name
    )


@torch.inference_mode()
@pytest.mark.parametrize("pair", ["odd"], indirect=True)
def test_every_moved_weight_shows(pair: Pair) -> None:
    """No weight is ignored: this comparison fails when any tensor is off by 1e-3."""
    inputs = pair.inputs((SIZES[1], 33))
    [reference] = theirs(pair.theirs, *inputs)
    for name, weight in pair.ours.state_dict().items():
        original = weight.clone()
        weight[..., ::2].add_(1e-3)
        [moved] = ours(pair.ours, *inputs)
        weight.copy_(original)
        assert difference(moved, reference) > TOLERANCE, name


@torch.inference_mode()
def test_one_moved_element_shows(pair: Pair) -> None:
    inputs = pair.inputs((SIZES[1], 33))
    [reference] = theirs(pair.theirs, *inputs)
    element = pair.ours.get_parameter("layers.0.feed_forward.w2.weight")[3, 5]
    element += 1e-3
    [moved] = ours(pair.ours, *inputs)
    element -= 1e-3
    assert difference(moved, reference) > TOLERANCE


@torch.inference_mode()
def test_bfloat16_errs_no_more_than_the_reference(model_folder: Path) -> None:
    cpu = torch.device("cpu")
    exact = Pair(
        load_transformer(model_folder, cpu, torch.bfloat16).float(),
        ZImageTransformer2DModel.from_pretrained(
            model_folder / "transformer", torch_dtype=torch.bfloat16, low_cpu_mem_usage=False
        ),
    )
    rounded = load_transformer(model_folder, cpu, torch.bfloat16)
    latents, features, times = exact.inputs((SIZES[2], 90))
    latents = [x.bfloat16().float() for x in latents]
    features = [x.bfloat16() for x in features]
    [truth] = ours(exact.ours, latents, features, times)
    [our_velocity] = ours(rounded, latents, features, times)
    [their_velocity] = theirs(exact.theirs, latents, features, times)
    our_error = (our_velocity - truth).abs().mean()
    assert our_error <= 1.1 * (their_velocity - truth).abs().mean()


def test_gradients(pair: Pair) -> None:
    latents, features, times = pair.inputs((SIZES[1], 20))
    name = "layers.1.attention.to_k.weight"
    gradients = []
    for forward, model in ((ours, pair.ours), (theirs, pair.theirs)):
        image = latents[0].clone().requires_grad_()
        weight = model.get_parameter(name)
        weight.requires_grad_(True)
        [velocity] = forward(model, [image], features, times)
        gradients.append(torch.autograd.grad(velocity.square().mean(), (image, weight)))
        weight.requires_grad_(False)
    for gradient, reference in zip(*gradients, strict=True):
        assert difference(gradient, reference) <= TOLERANCE


@torch.inference_mode()
def test_diffusers_call(pair: Pair) -> None:
    latents, features, times = pair.inputs((SIZES[0], 33), (SIZES[0], 90))
    stacked = [latents_CHW.unsqueeze(1) for latents_CHW in latents]
    face = DiffusersFace(pair.ours)
    velocities = face(stacked, times, features, return_dict=False)[0]
    references = pair.theirs(stacked, times, features, return_dict=False)[0]
    for velocity, reference in zip(velocities, references, strict=True):
        assert difference(velocity, reference) <= TOLERANCE


def test_inside_diffusers_pipeline(base_folder: Path) -> None:
    """With guidance: two captions of different lengths per step."""
    pipeline = ZImagePipeline.from_pretrained(base_folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    transformer = load_transformer(base_folder, torch.device("cpu"), torch.float32)

    def latents() -> Tensor:
        return pipeline(
            "a red circle on a blue background",
            negative_prompt="",
            height=96,
            width=128,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images

    reference = latents()
    pipeline.register_modules(transformer=DiffusersFace(transformer))
    assert difference(latents(), reference) <= TOLERANCE
