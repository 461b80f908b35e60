"""What an encoder's identity covers, what it does not, and how long it is remembered."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_core.errors import InvalidModel
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.wire.identities import encoder_identities

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy to change: three layers, values that fit bfloat16."""
    copy = tmp_path / "model"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(model_folder / part, copy / part)
    _rewrite(copy, lambda tensors: {name: _rounded(tensors[name]) for name in tensors})
    return copy


def _identities(model: Path) -> dict[int, str]:
    return encoder_identities(EncoderFiles.of(model), model / "cache")


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def _weights(model: Path) -> Path:
    return model / "text_encoder" / "model.safetensors"


def _rewrite(model: Path, change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(_weights(model)).items()}
    save_file(dict(change(tensors)), _weights(model))


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _config(model: Path) -> Path:
    return model / "text_encoder" / "config.json"


def _tokenizer(model: Path) -> Path:
    return model / "tokenizer" / "tokenizer.json"


def _nudge(name: str) -> Callable[[Tensors], Tensors]:
    """Changes one value of one tensor."""

    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[0] += 0.25
        return tensors

    return change


def _in_two_prefixed_files(model: Path) -> None:
    tensors = load_file(_weights(model))
    _weights(model).unlink()
    tensors |= {
        "lm_head.weight": torch.ones(3),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    for index in range(2):
        names = sorted(tensors)[index::2]
        save_file(
            {f"model.{name}" if "lm_head" not in name else name: tensors[name] for name in names},
            model / "text_encoder" / f"model-{index}.safetensors",
        )


def _in_the_spelling_of_transformers_4(model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["rope_theta"] = int(config.pop("rope_parameters")["rope_theta"])
        config |= {"rope_scaling": None, "transformers_version": "4.51.0", "use_cache": False}

    _edit(_config(model), change)


def _tokenizer_respelled(model: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer |= {"padding": {"strategy": "BatchLongest"}, "decoder": None}
        tokenizer["truncation"] = {"max_length": 5}
        tokenizer["pre_tokenizer"]["trim_offsets"] = False
        tokenizer["added_tokens"].reverse()
        tokenizer["model"]["end_of_word_suffix"] = ""

    _edit(_tokenizer(model), change)


@pytest.mark.parametrize(
    "respell",
    [
        lambda model: _rewrite(model, lambda found: {k: v.bfloat16() for k, v in found.items()}),
        _in_two_prefixed_files,
        _in_the_spelling_of_transformers_4,
        _tokenizer_respelled,
    ],
    ids=["bfloat16", "two prefixed files", "transformers 4", "tokenizer"],
)
def test_the_same_values_in_another_form_are_the_same_encoder(
    model: Path, respell: Callable[[Path], None]
) -> None:
    before = _identities(model)
    respell(model)
    assert _identities(model) == before


def test_float16_counts_by_its_values(model: Path) -> None:
    special = torch.tensor([0.0, -0.0, 6e-8, 65504.0, 1 / 3]).half()
    _rewrite(
        model, lambda found: {k: v.half() for k, v in found.items()} | {"norm.weight": special}
    )
    halves = _identities(model)
    _rewrite(model, lambda found: {name: tensor.float() for name, tensor in found.items()})
    assert _identities(model) == halves


@pytest.mark.parametrize(
    ("name", "unchanged"),
    [
        ("embed_tokens.weight", 0),
        ("layers.0.mlp.up_proj.weight", 1),
        ("layers.1.self_attn.q_norm.weight", 2),
        ("layers.2.self_attn.o_proj.weight", 3),
        ("norm.weight", 3),
    ],
)
def test_a_changed_weight_changes_the_states_from_its_layer_on(
    model: Path, name: str, unchanged: int
) -> None:
    before = _identities(model)
    _rewrite(model, _nudge(name))
    after = _identities(model)
    assert [before[state] == after[state] for state in range(-4, 0)] == [
        state < unchanged for state in range(4)
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer["model"]["vocab"].update({"a": 98, "b": 97}),
        lambda tokenizer: tokenizer["model"]["merges"].append(["a", "b"]),
        lambda tokenizer: tokenizer["added_tokens"].pop(),
        lambda tokenizer: tokenizer.update(normalizer={"type": "NFC"}),
        lambda tokenizer: tokenizer["pre_tokenizer"].update(use_regex=True),
    ],
)
def test_what_changes_token_ids_changes_every_state(
    model: Path, change: Callable[[Any], None]
) -> None:
    before = _identities(model)
    _edit(_tokenizer(model), change)
    assert not set(before.values()) & set(_identities(model).values())


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["rope_parameters"].update(rope_theta=5e5),
        lambda config: config.update(rms_norm_eps=1e-5),
        lambda config: config.update(num_key_value_heads=4),
    ],
)
def test_what_changes_the_arithmetic_changes_every_state(
    model: Path, change: Callable[[Any], None]
) -> None:
    before = _identities(model)
    _edit(_config(model), change)
    assert not set(before.values()) & set(_identities(model).values())


def test_an_encoder_from_which_the_end_was_cut_is_no_stranger(model: Path) -> None:
    whole = _identities(model)
    assert list(whole) == [-4, -3, -2, -1]
    unused = ("layers.2.", "norm.")
    _rewrite(
        model,
        lambda found: {name: found[name] for name in found if not name.startswith(unused)},
    )
    cut = _identities(model)
    assert list(cut) == [-4, -3, -2]
    assert cut.items() <= whole.items()


def test_another_family_is_refused_and_not_a_crash(model: Path) -> None:
    _config(model).write_text('{"model_type": "t5", "num_hidden_layers": 3}')
    with pytest.raises(InvalidModel, match="num_attention_heads"):
        _identities(model)


def test_a_folder_without_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="text_encoder"):
        encoder_identities(EncoderFiles.of(tmp_path), tmp_path / "cache")


def test_it_is_remembered_while_size_and_time_of_all_files_stay(model: Path) -> None:
    before = _identities(model)
    found = _weights(model).stat()
    _rewrite(model, _nudge("embed_tokens.weight"))
    os.utime(_weights(model), ns=(found.st_atime_ns, found.st_mtime_ns))
    assert _identities(model) == before
    os.utime(_weights(model), ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert _identities(model) != before


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}', "\0"])
def test_a_broken_memory_is_replaced(model: Path, content: str) -> None:
    before = _identities(model)
    [entry] = (model / "cache").iterdir()
    good = entry.read_text()
    entry.write_text(content)
    assert _identities(model) == before
    assert entry.read_text() == good
    assert [path.name for path in (model / "cache").iterdir()] == [entry.name]


def test_it_works_where_nothing_can_be_remembered(model: Path) -> None:
    (model / "file").touch()
    assert encoder_identities(EncoderFiles.of(model), model / "file" / "cache") == _identities(
        model
    )
