"""D5: attention packages are called as they want to be; what cannot work or computes wrong numbers
is not chosen, and said why."""

import inspect
import json
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.nn.attention import varlen

from demo_model.random_model import Shape
from dit_service.engine import attention
from dit_service.engine.attention import choose
from dit_service.model.attention.backend import Place
from dit_service.model.attention.backends import BACKENDS
from dit_service.model.config import TransformerConfig
from dit_service.model.transformer import Sample, ZImageTransformer
from tests.fakes import attention as fakes
from zimage_core.errors import InvalidSettings

CPU = torch.device("cpu")
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
PACKAGES = ["flash_attn_3", "flash_attn_2", "torch_varlen", "xformers", "sage"]
ROUNDING = 0.01  # of bfloat16


def _place(capability: tuple[int, int] = HOPPER, dtype: torch.dtype = torch.bfloat16) -> Place:
    """A GPU by its word: what is there computes on the CPU."""
    return Place(CPU, capability, dtype, 64)


def _qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, 3, 64, generator=generator).bfloat16() for _ in range(3)]


def test_the_stand_in_of_torchs_own_has_its_signature() -> None:
    real, ours = (
        [(one.name, one.kind, one.default) for one in inspect.signature(call).parameters.values()]
        for call in (varlen.varlen_attn, fakes.torch_varlen)
    )
    assert real == ours


@pytest.mark.parametrize("lengths", [(40,), (7, 33, 64), (16, 16)])
@pytest.mark.parametrize("name", PACKAGES)
def test_each_gets_its_samples_apart(
    name: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install(monkeypatch)
    qkv = _qkv(sum(lengths))
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    result = BACKENDS[name].attend(*qkv, lengths, bounds)
    exact = BACKENDS["sdpa"].attend(*(x.float() for x in qkv), lengths, bounds)
    assert (result.float() - exact).abs().max() <= ROUNDING * exact.abs().max()


@pytest.mark.parametrize("name", PACKAGES)
@torch.inference_mode()
def test_a_whole_forward_is_the_same_by_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch)
    values = {"all_patch_size": [2], "in_channels": 16, "norm_eps": 1e-5}
    values |= {"rope_theta": 256.0, "t_scale": 1000.0}
    config = TransformerConfig.from_values(values | Shape().transformer)
    torch.manual_seed(0)
    model = ZImageTransformer(config).bfloat16()
    features = [torch.randn(length, config.cap_feat_dim) for length in (9, 40)]

    def velocities(backend: str) -> list[torch.Tensor]:
        captions = model.encode_captions(features, backend)
        [moment] = model.modulate(torch.tensor([0.4]))
        samples = [
            Sample(torch.ones(16, size, 8), caption, moment)
            for size, caption in zip((8, 12), captions, strict=True)
        ]
        shapes = [model.shape_of(one.latents_CHW, one.caption) for one in samples]
        made: list[torch.Tensor] = model(samples, model.layout(shapes), backend)
        return made

    for one, other in zip(velocities(name), velocities("sdpa"), strict=True):
        assert (one - other).abs().max() <= 0.05 * other.abs().max()


def test_the_fastest_that_computes_right_is_chosen_and_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fakes.install(monkeypatch)
    monkeypatch.setattr(attention, "_RACE_LENGTHS", (64, 32))
    choice = choose("auto", _place(), 2, tmp_path)
    raced = {"sdpa", "torch_varlen", "flash_attn_3", "flash_attn_2", "xformers"}
    told = choice.reasons
    assert choice.backend in raced
    assert told[choice.backend].endswith(", the fastest")
    assert all("ms for 96 tokens" in told[name] for name in raced)
    assert "fewer bits" in told["sage"]
    [(key, times)] = json.loads((tmp_path / "attention.json").read_text()).items()
    fastest = times | {"flash_attn_2": 1e-9}
    (tmp_path / "attention.json").write_text(json.dumps({key: fastest}))
    assert choose("auto", _place(), 2, tmp_path).backend == "flash_attn_2"
    (tmp_path / "attention.json").write_text("[")
    assert choose("auto", _place(), 2, tmp_path).backend in raced


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "why"),
    [
        ("flash_attn_3", AMPERE, torch.bfloat16, "9.0 or more and below 10.0, and here is 8.0"),
        ("flash_attn_2", TURING, torch.bfloat16, "8.0 or more, and here is 7.5"),
        ("torch_varlen", (0, 0), torch.bfloat16, "and here is none"),
        ("sage", HOPPER, torch.float32, "it needs bfloat16 or float16"),
    ],
)
def test_what_cannot_work_is_said(
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fakes.install(monkeypatch)
    monkeypatch.setattr(attention, "_RACE_LENGTHS", (64, 32))
    place = _place(capability, dtype)
    with pytest.raises(InvalidSettings, match=why):
        choose(name, place, 2, tmp_path)
    choice = choose("auto", place, 2, tmp_path)
    assert choice.backend != name
    assert why in choice.reasons[name]


def _wrong_scale(*qkv_and_bounds: torch.Tensor | int) -> torch.Tensor:
    q, *rest = qkv_and_bounds
    assert isinstance(q, torch.Tensor)
    return fakes.flash_attn_2(q * 1.1, *rest)  # type: ignore[arg-type]


def _mixes_samples(*qkv_and_bounds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv_and_bounds[:3]
    return fakes.attended(q, k, v, (0, len(q)), q.shape[-1] ** -0.5)


def _no_numbers(*qkv_and_bounds: torch.Tensor) -> torch.Tensor:
    return qkv_and_bounds[0] * float("nan")


def _lacks_its_kernel(*_: torch.Tensor) -> torch.Tensor:
    raise torch.AcceleratorError("CUDA error: no kernel image is available for execution\nmore")


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (_wrong_scale, "it computes wrong numbers"),
        (_mixes_samples, "it computes wrong numbers"),
        (_no_numbers, "it computes wrong numbers: nan"),
        (_lacks_its_kernel, "its trial failed: AcceleratorError: CUDA error: no kernel image"),
    ],
)
def test_wrong_numbers_are_not_chosen(
    kernel: object, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fakes.install(monkeypatch)
    monkeypatch.setattr(attention, "_RACE_LENGTHS", (64, 32))
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", kernel)
    choice = choose("auto", _place(), 2, tmp_path)
    assert choice.backend != "flash_attn_2"
    assert why in choice.reasons["flash_attn_2"]
    with pytest.raises(InvalidSettings, match=why):
        choose("flash_attn_2", _place(), 2, tmp_path)


def test_who_fails_at_the_size_of_pictures_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fakes.install(monkeypatch)
    monkeypatch.setattr(attention, "_RACE_LENGTHS", (640, 320))

    def cramped(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if len(q) > 500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fakes.flash_attn_2(q, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", cramped)
    choice = choose("auto", _place(), 2, tmp_path)
    assert choice.backend != "flash_attn_2"
    assert choice.reasons["flash_attn_2"] == "it failed at the size of pictures"
    assert not (tmp_path / "attention.json").exists()


def test_heads_of_any_width_have_one(tmp_path: Path) -> None:
    assert choose("auto", Place.of(CPU, torch.float32, 20), 2, tmp_path).backend == "sdpa"


def test_without_packages_torchs_own_is_used(tmp_path: Path) -> None:
    place = Place.of(CPU, torch.float32, 24)
    choice = choose("auto", place, 2, tmp_path)
    assert choice.backend == "sdpa"
    assert choice.reasons["flash_attn_2"] == "flash_attn is not installed"
    assert choose("sdpa", place, 2, tmp_path).reasons["sdpa"] == "available: it was asked for"
    with pytest.raises(InvalidSettings, match="there is none of that name; allowed are auto, sdpa"):
        choose("flash", place, 2, tmp_path)
    with pytest.raises(InvalidSettings, match="flash_attn_interface is not installed"):
        choose("flash_attn_3", place, 2, tmp_path)
