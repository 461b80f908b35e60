"""E5: the encoder against transformers' hidden states, whatever else is in the batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from encoder_service.engine.prefixes import Prefixes
from encoder_service.model.loading import load
from encoder_service.model.qwen import Qwen3Encoder, Text
from zimage_core.embeddings import Blend
from zimage_core.errors import Cancelled
from zimage_core.formats.encoder_files import EncoderFiles


def files(folder: Path) -> EncoderFiles:
    return EncoderFiles(folder, folder / "tokenizer.json")


TOLERANCE = 1e-5
"""Relative to the reference's largest absolute value."""

LAYER_COUNT = 4
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "odd sizes": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20},
    "stretched rope": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    },
}
BATCHES = {
    "one": [19],
    "single tokens": [1, 1, 1],
    "around 32": [31, 32, 33],
    "mixed": [1, 200, 8, 33, 64],
    "a full call": [8 + 3 * index for index in range(32)],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than these small layers take."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@dataclass(frozen=True)
class Model:
    """A folder with random weights, and what transformers reads from it."""

    folder: Path
    reference: Any

    @cache  # noqa: B019 - lives as long as the tests
    def states(self, ids: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The hidden states of one prompt alone."""
        with torch.no_grad():
            run = self.reference(torch.tensor([ids]), output_hidden_states=True)
        return tuple(run.hidden_states)


def _config(shape: dict[str, Any]) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYER_COUNT,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **shape,
    )


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With a language head and in shards, as the released encoder is."""
    torch.manual_seed(7)
    written = Qwen3ForCausalLM(_config(SHAPES[request.param]))
    for parameter in written.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("encoder")
    written.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    reference: Any = Qwen3Model.from_pretrained(folder).requires_grad_(False)
    moved_by = request.config.getoption("--move-a-weight")
    reference.get_parameter("layers.0.mlp.down_proj.weight")[3, 5] += moved_by
    return Model(folder, reference)


def _prompts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(sum(lengths))
    return [tuple(torch.randint(0, 97, (length,), generator=draw).tolist()) for length in lengths]


def _assert_equal(
    model: Model, encoder: Qwen3Encoder, lengths: list[int], layers: list[int]
) -> None:
    prompts = _prompts(lengths)
    runs = encoder(_texts(prompts, layers))
    for ids, layer, run in zip(prompts, layers, runs, strict=True):
        _assert_near(run.state, model.states(ids)[layer][0])


def _texts(prompts: Sequence[tuple[int, ...]], layers: Sequence[int]) -> list[Text]:
    return [Text(ids, ((layer, 1.0),)) for ids, layer in zip(prompts, layers, strict=True)]


def _assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    assert worst <= TOLERANCE, f"{len(ours)} tokens: {worst:.1e}"


@pytest.mark.parametrize("batch", BATCHES)
def test_usual_state_in_any_batch(model: Model, batch: str) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    _assert_equal(model, encoder, BATCHES[batch], [-2] * len(BATCHES[batch]))


def test_each_prompt_may_ask_for_another_state(model: Model) -> None:
    encoder = load(files(model.folder), -1, "cpu", "float32")
    _assert_equal(model, encoder, [9, 40, 1, 17, 40], [-1, -5, -2, -4, -3])


@pytest.mark.parametrize("deepest", range(-LAYER_COUNT - 1, 0))
def test_each_state_can_be_the_deepest(model: Model, deepest: int) -> None:
    encoder = load(files(model.folder), deepest, "cpu", "float32")
    _assert_equal(model, encoder, [12, 5], [deepest, deepest])


def test_the_last_layer_the_norm_and_the_head_are_neither_loaded_nor_run(model: Model) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    assert len(encoder.layers) == LAYER_COUNT - 1
    assert not [name for name, _ in encoder.named_parameters() if name.startswith(("norm", "lm_"))]


def test_only_the_layers_that_are_asked_for_run(model: Model) -> None:
    encoder = load(files(model.folder), -1, "cpu", "float32")
    runs = _counted(encoder)
    encoder(_texts(_prompts([5, 9]), [-4, -3]))
    assert runs == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]


def test_each_linear_runs_once_whatever_the_batch(model: Model) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    runs = _counted(encoder)
    encoder(_texts(_prompts([5, 9, 200]), [-2, -2, -2]))
    assert runs == [f"layers.{layer}.mlp.up_proj" for layer in range(LAYER_COUNT - 1)]


def test_a_cancelled_run_ends_at_the_next_layer(model: Model) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    runs = _counted(encoder)
    with pytest.raises(Cancelled):
        encoder(_texts(_prompts([5, 9]), [-2, -2]), lambda: len(runs) == 2)
    assert len(runs) == 2


@pytest.mark.parametrize("count", [7, 33, 250])
def test_half_precision_is_as_near_as_that_of_transformers(model: Model, count: int) -> None:
    theirs = Qwen3Model.from_pretrained(model.folder, dtype=torch.bfloat16)
    ours = load(files(model.folder), -2, "cpu", "bfloat16")
    [ids] = _prompts([count])
    exact = model.states(ids)[-2][0]
    with torch.no_grad():
        half = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]
    found = ours(_texts([ids], [-2]))[0].state
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() <= 2 * (half - exact).square().mean()


def _counted(encoder: Qwen3Encoder) -> list[str]:
    """The names of one linear per layer, each time it runs."""
    runs: list[str] = []

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: runs.append(name)

    for name, module in encoder.named_modules():
        if name.endswith("up_proj"):
            module.register_forward_hook(counting(name))
    return runs


BLENDS: list[Blend] = [
    ((-2, 1.0),),
    ((-4, 0.25), (-2, 0.75)),
    ((-5, 1.0),),
    ((-4, -0.5), (-3, 0.5), (-2, 1.0)),
]


@pytest.mark.parametrize("blend", BLENDS, ids=str)
def test_what_begins_like_an_earlier_prompt_goes_on_from_there(model: Model, blend: Blend) -> None:
    """In one run with others, after edits in the middle, and from several beginnings."""
    encoder = load(files(model.folder), -2, "cpu", "float32")
    prefixes = Prefixes(1 << 30)
    first, other = _prompts([120, 50])
    edited = (*first[:77], *other)
    for batch, reused in (
        ([first[:40]], [0]),
        ([first, other], [40, 0]),
        ([edited, first, other[:9], first[:1]], [72, 112, 8, 0]),
        ([(*edited, 5)], [120]),
    ):
        texts = [prefixes.begun(Text(ids, blend)) for ids in batch]
        assert [len(text.token_ids) - len(text.rest) for text in texts] == reused
        runs = encoder(texts)
        for text, run in zip(texts, runs, strict=True):
            prefixes.keep(text, run)
            begun = [text.begun.state] if text.begun else []
            states = model.states(tuple(text.token_ids))
            _assert_near(
                torch.cat([*begun, run.state]),
                sum((states[layer][0] * part for layer, part in blend), torch.tensor(0.0)),
            )


def test_what_begins_another_blend_is_no_beginning(model: Model) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    prefixes = Prefixes(1 << 30)
    [ids] = _prompts([40])
    text = prefixes.begun(Text(ids, BLENDS[0]))
    prefixes.keep(text, encoder([text])[0])
    assert prefixes.begun(Text(ids, BLENDS[1])).begun is None


def test_beginnings_stay_within_their_bytes_and_go_from_the_end(model: Model) -> None:
    """What was met last stays, and nothing stays that has lost its own beginning."""
    encoder = load(files(model.folder), -2, "cpu", "float32")
    probe = Prefixes(1 << 30)
    text = probe.begun(Text(_prompts([8])[0], BLENDS[0]))
    probe.keep(text, encoder([text])[0])
    room = 10  # blocks
    prefixes = Prefixes(room * probe.bytes)

    def known(ids: Sequence[int]) -> int:
        text = prefixes.begun(Text((*ids, 1), BLENDS[0]))
        return len(text.token_ids) - len(text.rest)

    def run(ids: Sequence[int]) -> None:
        text = prefixes.begun(Text(ids, BLENDS[0]))
        prefixes.keep(text, encoder([text])[0])
        assert prefixes.bytes <= room * probe.bytes

    long, short, last = _prompts([64, 24, 40])
    run(long)
    run(short)
    assert (known(long), known(short)) == (56, 24)  # eleven blocks, one of them too many
    run(short)
    run(last)
    assert (known(long), known(short), known(last)) == (16, 24, 40)
    run(_prompts([200])[0])
    assert (known(long), known(_prompts([200])[0])) == (0, 80)
    assert Prefixes(0).begun(Text(long, BLENDS[0])).is_kept is False
