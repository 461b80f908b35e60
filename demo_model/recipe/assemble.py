"""The trained parts as a folder that diffusers and every service read."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from demo_model.recipe.diffusion import SHIFT
from demo_model.recipe.networks import TEXT, TRANSFORMER


def assemble(
    folder: Path,
    scratch: Path,
    autoencoder: Any,
    networks: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Writes the model in bfloat16; the folder appears complete or not at all."""
    transformer = ZImageTransformer2DModel(**TRANSFORMER)
    transformer.load_state_dict(networks["transformer"].state_dict())
    sizes = {name: value for name, value in TEXT.items() if name != "rope_theta"}
    text_encoder: Any = Qwen3Model(
        Qwen3Config(
            rope_parameters={"rope_type": "default", "rope_theta": TEXT["rope_theta"]},
            tie_word_embeddings=True,
            attention_bias=False,
            **sizes,
        )
    )
    with torch.no_grad():
        for parameter in text_encoder.parameters():  # the last layer is never used
            parameter.zero_()
    found = text_encoder.load_state_dict(networks["text"].state_dict(), strict=False)
    assert not found.unexpected_keys, found
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False
        ),
        vae=autoencoder.to(torch.bfloat16),
        text_encoder=text_encoder.to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=transformer.to(torch.bfloat16),
    )
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline.save_pretrained(scratch / "new")
    if folder.exists():
        shutil.move(folder, scratch / "old")
    shutil.move(scratch / "new", folder)
