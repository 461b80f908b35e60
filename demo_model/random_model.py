"""Builds a seeded random model of the true Z-Image architecture as a diffusers folder.

Tests and benchmarks take it where the sizes matter and the pictures do not: real loaders, real
services, real arithmetic, pictures of noise.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from demo_model.recipe.networks import TRANSFORMER

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; by default about the demo model's, for pictures of 128x128 pixels."""

    transformer: dict[str, Any] = field(default_factory=lambda: dict(TRANSFORMER))
    text_encoder: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_theta": 10000.0,
            "max_position_embeddings": 1024,
        }
    )
    vae: dict[str, Any] = field(
        default_factory=lambda: {
            "block_out_channels": [32, 32, 64, 96],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        }
    )
    shift: float = 3.0
    """The scheduler's static shift: 3 makes a Turbo, 6 a Base."""


def build(folder: Path, shape: Shape | None = None, seed: int = 0) -> None:
    """Writes the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _pipeline(shape or Shape()).save_pretrained(folder)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's special tokens over bare bytes: every text has tokens, nothing was trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return as_qwens(tokenizer, 131072)


def as_qwens(tokenizer: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    """With Qwen's special tokens and chat."""
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106 - no password
        pad_token="<|endoftext|>",  # noqa: S106
        model_max_length=longest,
        padding_side="right",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _pipeline(shape: Shape) -> ZImagePipeline:
    tokenizer = byte_level_tokenizer()
    text_sizes = dict(shape.text_encoder)
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            rope_parameters={"rope_type": "default", "rope_theta": text_sizes.pop("rope_theta")},
            tie_word_embeddings=True,
            attention_bias=False,
            **text_sizes,
        )
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(shape.vae["block_out_channels"]),
        up_block_types=["UpDecoderBlock2D"] * len(shape.vae["block_out_channels"]),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        **shape.vae,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=shape.shift, use_dynamic_shifting=False
        ),
        vae=_randomised(vae, 0.02),
        text_encoder=_randomised(text_encoder, 0.05),
        tokenizer=tokenizer,
        transformer=_randomised(ZImageTransformer2DModel(**shape.transformer), 0.05),
    )


def _randomised(model: torch.nn.Module, spread: float) -> torch.nn.Module:
    """Moves every vector off its initial constant: zeroed pads, biases and gates hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or 1 in parameter.shape:
                parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()
