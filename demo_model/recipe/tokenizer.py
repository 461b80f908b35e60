"""The tokenizer: byte-level pairs learnt from captions, with Qwen's special tokens and chat."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_model import captions, world
from demo_model.captions import Wording
from demo_model.random_model import SPECIAL_TOKENS, THINK_TOKENS, as_qwens
from demo_model.recipe.networks import TEXT
from encoder_service.prompt import render
from zimage_core.embeddings import Prompt

_CAPTIONS = 20_000
_SEED = 5
_TOKEN_MULTIPLE = 32
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's own tokenizer cuts a text before it looks for pairs."""


def build(folder: Path) -> PreTrainedTokenizerFast:
    """Learns it anew, which takes seconds, and writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL_TOKENS, *THINK_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT["vocab_size"] - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    wrapped = as_qwens(tokenizer, TEXT["max_position_embeddings"])
    wrapped.save_pretrained(folder)
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of prompts in their chat."""
    found: list[list[int]] = tokenizer([render(Prompt(text)) for text in texts])["input_ids"]
    return found


def padded(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """[B, L] with L a multiple of 32, and which of them are text."""
    longest = max(map(len, token_ids))
    width = -(-longest // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    ids = torch.zeros(len(token_ids), width, dtype=torch.long)
    is_text = torch.zeros(len(token_ids), width, dtype=torch.bool)
    for row, one in enumerate(token_ids):
        ids[row, : len(one)] = torch.tensor(one)
        is_text[row, : len(one)] = True
    return ids, is_text


def _texts() -> Iterator[str]:
    chance = random.Random(_SEED)  # noqa: S311 - no secret
    wording = Wording(filler=0.3)
    for _ in range(_CAPTIONS):
        yield captions.caption(world.any_scene(chance, held_out=False), wording, chance)
    yield from ("user\n", "assistant\n") * 2_000
