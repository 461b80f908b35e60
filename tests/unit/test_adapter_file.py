"""Adapter files that cannot be used are refused, each by what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import adapter_files
from zimage_core.errors import InvalidRequest
from zimage_core.formats.adapter_file import SETTINGS, AdapterPlan, read_plan
from zimage_core.formats.peft_folder import whole_file
from zimage_core.planning.flops import DitShape
from zimage_core.planning.linears import linears

SHAPE = DitShape(
    dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, in_channels=4, cap_feat_dim=16, patch_size=2
)
LINEARS = linears(SHAPE)
TO_Q = "layers.0.attention.to_q"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def _lora(*names: str) -> adapter_files.Lora:
    return adapter_files.random_lora({name: LINEARS[name] for name in names or LINEARS})


def _plan(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> AdapterPlan:
    save_file(tensors, path, metadata)
    return read_plan(path, LINEARS)


def _halves(name: str = f"transformer.{TO_Q}", rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, 24),
        f"{name}.lora_B.weight": torch.ones(24, rank),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("lokr_w1", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("oft_blocks", "OFT"),
        ("lora_mid.weight", "LoCon"),
        ("lora_B.bias", "LoRA with biases"),
        ("diff", "whole differences"),
    ],
)
def test_other_kinds_are_called_by_their_names(path: Path, name: str, kind: str) -> None:
    extra = {f"transformer.{TO_Q}.{name}": torch.ones(24)}
    with pytest.raises(InvalidRequest, match=kind) as refusal:
        _plan(path, _halves() | extra)
    assert refusal.value.reason == "ADAPTER_KIND"


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"text_encoder.layers.0.q_proj.lora_A.weight": (2, 24)}, "text encoder"),
        ({"layers.0.attention.to_q.bias": (24,)}, "no part of a LoRA is called layers.0"),
        (_halves("transformer.layers.7.attention.to_q"), "no linear transformer.layers.7"),
        (_halves(f"lora_unet_{TO_Q.replace('.', '_')}"), f"changes {TO_Q} twice"),
        ({f"transformer.{TO_Q}.lora_A.second.weight": (2, 24)}, "only one can be used"),
        ({f"transformer.{TO_Q}.lora_up.weight": (24, 2)}, "only one can be used"),
        ({".lora_B" * 100: (1,)}, r"no part of a LoRA is called \.lora_B"),
        ({"layers.1.attention.to_q.lora_A.weight": (2, 24)}, "lacks a second half"),
        ({"layers.1.attention.to_q.lora_B.weight": (24, 2)}, "lacks a first half"),
        ({"layers.1.attention.to_q.alpha": (1,)}, "lacks a first half"),
        ({f"transformer.{TO_Q}.alpha": (2,)}, "is no number but F32"),
        (_halves("layers.1.feed_forward.w2"), "for this model it would be"),
        (_halves("layers.1.attention.to_q", rank=0), "for this model it would be"),
    ],
)
def test_nothing_is_left_out(path: Path, extra: dict[str, object], why: str) -> None:
    made = {
        name: torch.ones(shape) if isinstance(shape, tuple) else shape
        for name, shape in extra.items()
    }
    with pytest.raises(InvalidRequest, match=why):
        _plan(path, _halves() | made)  # type: ignore[operator]


def test_a_file_must_be_one(path: Path) -> None:
    path.write_bytes(b"not at all")
    with pytest.raises(InvalidRequest, match="no usable safetensors file") as refusal:
        read_plan(path, LINEARS)
    assert str(path) not in refusal.value.message
    with pytest.raises(InvalidRequest, match="there is no LoRA in it"):
        _plan(path, {})
    with pytest.raises(InvalidRequest, match="is I64, allowed are"):
        _plan(path, {name: half.long() for name, half in _halves().items()})


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attention.to_q": 6}}, 3.0),
        ({"lora_alpha": 8, "alpha_pattern": {r"^layers\.0\.attention\.to_q": 6}}, 3.0),
        ({"lora_alpha": 8, "alpha_pattern": {"^attention.to_q": 6, "q": 1}}, 4.0),
        ({}, 1.0),
    ],
)
def test_strength_is_as_peft_has_it(
    path: Path, settings: dict[str, object], strength: float
) -> None:
    plan = _plan(path, _halves(), {SETTINGS: json.dumps(settings)})
    assert [change.strength for change in plan.changes] == [pytest.approx(strength)]


@pytest.mark.parametrize(
    "settings", ["[", "3", "[1]", '{"lora_alpha": "much"}', '{"lora_alpha": NaN}',
                 '{"lora_alpha": 1e300}', '{"lora_alpha": 1' + 400 * "0" + "}",
                 '{"alpha_pattern": {"(a+)+$": 1}}',
                 json.dumps({"alpha_pattern": {f"q{i}": 1 for i in range(1001)}})]
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(path: Path, settings: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        _plan(path, _halves(), {SETTINGS: settings})
    assert refusal.value.reason == "ADAPTER_FILE"


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_an_alpha_may_be_any_number(path: Path, kind: torch.dtype) -> None:
    alpha = torch.tensor(6, dtype=kind)
    plan = _plan(path, _halves() | {f"transformer.{TO_Q}.alpha": alpha})
    assert plan.changes[0].strength == 3.0


def test_what_is_written_twice_is_read_once(path: Path) -> None:
    """By the names of diffusers, and by those of the original code beside them."""
    lora = _lora(*(f"layers.0.attention.to_{one}" for one in ("q", "k", "v", "out.0")))
    split, _ = adapter_files.LAYOUTS["diffusion_model, alpha"](lora)
    both, _ = adapter_files.LAYOUTS["native, fused, A and B"](lora)
    plan = _plan(path, split | both)
    assert {change.linear for change in plan.changes} == lora.halves.keys()
    assert plan.rank == lora.rank
    del split["diffusion_model.layers.0.attention.to_q.lora_A.weight"]
    with pytest.raises(InvalidRequest, match="lacks a first half"):
        _plan(path, split | both)


def test_names_may_be_separated_at_every_underscore(path: Path) -> None:
    plan = _plan(path, _halves("layers.0.attention.to.q"))
    assert [change.linear for change in plan.changes] == [TO_Q]


def test_what_needs_other_weights_beside_it_is_refused(path: Path) -> None:
    settings = json.dumps({"lora_alpha": 2, "init_lora_weights": "pissa_niter_4"})
    with pytest.raises(InvalidRequest, match="pissa_niter_4 of peft changes the weights"):
        _plan(path, _halves(), {SETTINGS: settings})


def test_the_header_of_a_stranger_may_not_be_endless(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="its header has"):
        _plan(path, _halves(), {"tags": "x" * (9 << 20)})
    path.write_bytes((40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[Infinity]}}')
    with pytest.raises(InvalidRequest, match="malformed"):
        read_plan(path, LINEARS)


def test_a_folder_of_peft_says_its_strength(tmp_path: Path) -> None:
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(_halves("base_model.model." + TO_Q), weights, {"format": "pt"})
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    with whole_file(tmp_path) as whole:
        plan = read_plan(whole, LINEARS)
        assert load_file(whole).keys() == load_file(weights).keys()
    assert plan.changes[0].strength == 4.0
    assert plan.metadata["format"] == "pt"
    with whole_file(weights) as whole:
        assert read_plan(whole, LINEARS) == plan
    with whole_file(tmp_path / "other.safetensors") as same:
        assert same == tmp_path / "other.safetensors"
    config.write_text(json.dumps({"peft_type": "LOKR"}))
    with pytest.raises(InvalidRequest, match="LOKR of peft"), whole_file(tmp_path):
        pass
    weights.unlink()
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InvalidRequest, match="wanted in a folder"), whole_file(tmp_path):
        pass
