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

from encoder_service.model.loading import load
from encoder_service.model.qwen import Qwen3Encoder
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
    for ids, layer, ours in zip(prompts, layers, encoder(prompts, layers), strict=True):
        theirs = model.states(ids)[layer][0]
        assert ours.shape == theirs.shape
        worst = float((ours - theirs).abs().max() / theirs.abs().max())
        assert worst <= TOLERANCE, f"{len(ids)} tokens at {layer}: {worst:.1e}"


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
    encoder(_prompts([5, 9]), [-4, -3])
    assert runs == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]


def test_each_linear_runs_once_whatever_the_batch(model: Model) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    runs = _counted(encoder)
    encoder(_prompts([5, 9, 200]), [-2, -2, -2])
    assert runs == [f"layers.{layer}.mlp.up_proj" for layer in range(LAYER_COUNT - 1)]


def test_a_cancelled_run_ends_at_the_next_layer(model: Model) -> None:
    encoder = load(files(model.folder), -2, "cpu", "float32")
    runs = _counted(encoder)
    with pytest.raises(Cancelled):
        encoder(_prompts([5, 9]), [-2, -2], lambda: len(runs) == 2)
    assert len(runs) == 2


def test_half_precision_is_that_of_transformers(model: Model) -> None:
    theirs = Qwen3Model.from_pretrained(model.folder, dtype=torch.bfloat16)
    ours = load(files(model.folder), -2, "cpu", "bfloat16")
    [ids] = _prompts([33])
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]
    assert torch.equal(ours([ids], [-2])[0], expected)


def _counted(encoder: Qwen3Encoder) -> list[str]:
    """The names of one linear per layer, each time it runs."""
    runs: list[str] = []

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: runs.append(name)

    for name, module in encoder.named_modules():
        if name.endswith("up_proj"):
            module.register_forward_hook(counting(name))
    return runs
