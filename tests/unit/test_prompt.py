"""The chat format, the tokenizer against transformers', and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder_service.prompt import (
    LengthLimits,
    TokenIds,
    Tokenizer,
    check_hidden_layers,
    read_row_limit,
    render,
    to_run,
)
from zimage_core.embeddings import LONG_PROMPT_MODES, TRUNCATE, Prompt
from zimage_core.errors import InvalidModel, InvalidRequest
from zimage_core.wire.limits import PROMPT_BYTES

CAT = "<|im_start|>user\na cat<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"

ODD_TEXTS = [
    "",
    " ",
    "two  spaces\tand\n\n\nlines \r\n",
    "cafe\u0301 n\u0303 \ufb01 \u2460",  # what normalization would change
    "\U0001f9d1\u200d\U0001f680 \U0001f1e9\U0001f1ea \ufffd \u0000 \u202e",
    "\u4e00\u53ea\u732b \u05d7\u05ea\u05d5\u05dc \u0e41\u0e21\u0e27 12345 it's We'LL",
    "typed <|im_end|>\n<|im_start|>system\n and <think></think> and <|im_end|",
]


@pytest.fixture(scope="module")
def demo(model_folder: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    folder = model_folder / "tokenizer"
    return Tokenizer(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Qwen's own class, normalizer and splitting, with merges learned from a few lines."""
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    base = Qwen2Tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    base.backend_tokenizer.train_from_iterator([*ODD_TEXTS, "a red circle on a cat"] * 9, trainer)
    learned = json.loads(base.backend_tokenizer.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    theirs = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges)
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    theirs.add_tokens([AddedToken(name, special=name.startswith("<|")) for name in names])
    folder = tmp_path_factory.mktemp("qwen")
    theirs.save_pretrained(folder)
    return Tokenizer(folder / "tokenizer.json"), theirs


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt("a cat"), CAT + OPEN),
        (Prompt(""), "<|im_start|>user\n<|im_end|>\n" + OPEN),
        (Prompt("a cat", system="Draw."), "<|im_start|>system\nDraw.<|im_end|>\n" + CAT + OPEN),
        (Prompt("a cat", thinking="Hm."), CAT + OPEN + "<think>\nHm.\n</think>\n\n"),
        (Prompt("a cat", force_think_block=True), CAT + OPEN + "<think>\n\n</think>\n\n"),
        (Prompt("a cat", assistant="Here"), CAT + OPEN + "Here<|im_end|>"),
        (
            Prompt("a cat", thinking="Hm.", assistant="Here"),
            CAT + OPEN + "<think>\nHm.\n</think>\n\nHere<|im_end|>",
        ),
        (Prompt('a "cat"', strip_quotes=True), CAT + OPEN),
        (Prompt(' a "cat"\n\n\n'), '<|im_start|>user\n a "cat"\n\n\n<|im_end|>\n' + OPEN),
    ],
)
def test_chat_format(prompt: Prompt, expected: str) -> None:
    assert render(prompt) == expected


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("system", ["", "You draw."])
def test_it_is_the_models_own_template(demo: tuple[Tokenizer, Any], text: str, system: str) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    expected = demo[1].apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert render(Prompt(text, system=system)) == expected


@pytest.mark.parametrize("source", ["demo", "qwen"])
@pytest.mark.parametrize("text", ODD_TEXTS)
def test_token_ids_are_those_of_transformers(
    request: pytest.FixtureRequest, source: str, text: str
) -> None:
    ours, theirs = request.getfixturevalue(source)
    prompts = [Prompt(text, system=text, thinking=text), Prompt(text)]
    expected = theirs([render(prompt) for prompt in prompts]).input_ids
    assert list(map(list, ours.encode(prompts))) == expected


@given(st.text(max_size=40))
def test_any_text_has_the_token_ids_of_transformers(qwen: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = qwen
    [ids] = ours.encode([Prompt(text)])
    assert list(ids) == theirs(render(Prompt(text))).input_ids


def test_a_tokens_name_in_a_prompt_is_that_token(demo: tuple[Tokenizer, Any]) -> None:
    ours, theirs = demo
    [plain, typed] = ours.encode([Prompt(""), Prompt("<|im_end|>")])
    assert len(typed) == len(plain) + 1
    assert typed.count(theirs.convert_tokens_to_ids("<|im_end|>")) == 2


def test_padding_and_truncation_in_the_file_are_ignored(
    model_folder: Path, tmp_path: Path, demo: tuple[Tokenizer, Any]
) -> None:
    from tokenizers import Tokenizer as Library

    cutting = Library.from_file(str(model_folder / "tokenizer" / "tokenizer.json"))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    cutting.save(str(tmp_path / "tokenizer.json"))
    prompts = [Prompt("a cat"), Prompt("")]
    assert Tokenizer(tmp_path / "tokenizer.json").encode(prompts) == demo[0].encode(prompts)


@pytest.mark.parametrize("mode", [None, *LONG_PROMPT_MODES])
def test_a_long_prompt_is_compressed_cut_or_refused(
    demo: tuple[Tokenizer, Any], mode: str | None
) -> None:
    limits = LengthLimits(tokens=24, rows=20)
    prompts = [Prompt("a cat", long_prompt_mode=mode), Prompt("x", system="and much longer still")]
    short, long = demo[0].encode(prompts)
    assert (len(short), len(long)) == (24, 51)

    def cut(text: Prompt, ids: TokenIds) -> TokenIds:
        return to_run(1, text, limits.recipe(text), ids)

    kept = short[:20] if mode == TRUNCATE else short
    assert cut(prompts[0], short) == kept
    assert limits.recipe(prompts[0]).row_count(24) == 20
    if mode == TRUNCATE:
        told = replace(prompts[1], long_prompt_mode=mode, token_limit=9)
        assert cut(told, long) == long[:9]
        assert limits.recipe(told).row_count(51) == 9
        return
    with pytest.raises(InvalidRequest, match="truncate") as refusal:
        cut(prompts[1], long)
    assert refusal.value.reason == "TOKEN_LIMIT"
    assert refusal.value.fields == {
        "field": "prompts[1].system",
        "given": "51",
        "allowed": "24",
        "unit": "tokens",
    }


@pytest.mark.parametrize("limit", [-1, 0, 25])
def test_a_token_limit_that_cannot_be_is_refused(limit: int) -> None:
    limits = LengthLimits(tokens=24, rows=20)
    limits.check([Prompt("", token_limit=24), Prompt("", token_limit=1)])
    with pytest.raises(InvalidRequest, match="allowed is 1 to 24") as refusal:
        limits.check([Prompt(""), Prompt("", token_limit=limit)])
    assert refusal.value.field == "prompts[1].token_limit"


def test_a_blend_is_of_states_that_are_there_and_its_weights_add_up_to_one() -> None:
    blend = Prompt("", hidden_layer=-5, blend=((-2, 3.0), (-4, 1.0), (-3, 0.0)))
    assert blend.effective_blend == ((-4, 0.25), (-2, 0.75))
    assert blend.effective_layer == -2
    assert Prompt("", blend=((-9, 0.1),)).effective_blend == ((-9, 1.0),)
    check_hidden_layers([blend], 36, -2)
    with pytest.raises(InvalidRequest) as refusal:
        check_hidden_layers([Prompt("", blend=((-2, 1.0), (-38, 1.0)))], 36, -2)
    assert refusal.value.field == "prompts[0].blend"
    for weights in ([1.0, -1.0], [math.nan, 1.0], [math.inf, 1.0], [1e308, 1e308]):
        with pytest.raises(ValueError, match="blend: the weights"):
            Prompt("", blend=((-2, weights[0]), (-3, weights[1])))
    with pytest.raises(ValueError, match="each hidden layer is allowed once"):
        Prompt("", blend=((-2, 1.0), (-2, 1.0)))


def test_too_many_bytes_are_refused_before_tokenizing(demo: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        demo[0].encode([Prompt("\u00e9" * (PROMPT_BYTES // 2), assistant="!")])
    assert refusal.value.fields["given"] == str(PROMPT_BYTES + 1)
    assert refusal.value.fields["unit"] == "bytes"


def test_hidden_layers_from_the_token_table_to_the_deepest_computed() -> None:
    check_hidden_layers([Prompt("", hidden_layer=layer) for layer in range(-37, -1)], 36, -2)
    check_hidden_layers([Prompt("", hidden_layer=-1)], 36, -1)


@pytest.mark.parametrize("layer", [-38, -1, 0, 1, 36])
def test_other_hidden_layers_are_refused(layer: int) -> None:
    with pytest.raises(InvalidRequest, match=r"-37 to -2 allowed") as refusal:
        check_hidden_layers([Prompt(""), Prompt("", hidden_layer=layer)], 36, -2)
    assert refusal.value.reason == "HIDDEN_LAYER"
    assert refusal.value.field == "prompts[1].hidden_layer"
    assert ("--max-hidden-layer -1" in refusal.value.message) == (layer == -1)


def test_row_limit_is_that_of_the_dit_in_the_folder(tmp_path: Path) -> None:
    assert read_row_limit(tmp_path) == 1504
    config = tmp_path / "transformer" / "config.json"
    config.parent.mkdir()
    config.write_text('{"axes_lens": [1024, 512, 512]}')
    assert read_row_limit(tmp_path) == 992
    config.write_text("{}")
    with pytest.raises(InvalidModel, match="axes_lens"):
        read_row_limit(tmp_path)


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"tokenizer\.json: this file is missing"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")
