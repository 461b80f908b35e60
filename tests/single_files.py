"""Models in single files as ComfyUI reads them, made of folders: the names of the original code."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from demo_model.random_model import Shape, build

SHAPE = Shape(
    transformer={
        "dim": 256,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 128,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    text_encoder={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960,
    },
    vae={
        "block_out_channels": [32, 32, 64, 64],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
)
"""Small, with the constants of the published models."""

_VAE_NAMES = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", lambda found: f".up.{3 - int(found[1])}.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f".up.{3 - int(found[1])}.upsample."),
    (r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def build_folder(folder: Path) -> Path:
    """The model as a folder in diffusers layout."""
    build(folder, SHAPE, seed=3)
    return folder


def write_transformer(folder: Path, path: Path, prefix: str = "") -> Path:
    """The transformer of a folder as a single file."""
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    found: dict[str, torch.Tensor] = {"norm_final.weight": torch.ones(256)}
    for name, weight in weights.items():
        if ".attention.to_q." in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif not re.search(r"\.attention\.to_[kv]\.", name):
            name = name.replace("all_x_embedder.2-1.", "x_embedder.")  # noqa: PLW2901
            name = name.replace("all_final_layer.2-1.", "final_layer.")  # noqa: PLW2901
            name = name.replace(".attention.to_out.0.", ".attention.out.")  # noqa: PLW2901
            found[re.sub(r"\.attention\.norm_([qk])\.", r".attention.\1_norm.", name)] = weight
    save_file({prefix + name: weight for name, weight in found.items()}, path)
    return path


def write_vae(folder: Path, path: Path) -> Path:
    """The VAE of a folder as a single file."""
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    found = {}
    for name, weight in weights.items():
        renamed: str = name
        for pattern, replacement in _VAE_NAMES:
            renamed = re.sub(pattern, replacement, renamed)  # type: ignore[arg-type,call-overload]
        is_linear = ".attn_1." in renamed and weight.dim() == 2
        found[renamed] = weight[:, :, None, None].contiguous() if is_linear else weight
    save_file(found, path)
    return path


def write_encoder(folder: Path, path: Path, prefix: str = "model.") -> Path:
    """The encoder of a folder as a single file."""
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    save_file({prefix + name.removeprefix("model."): one for name, one in weights.items()}, path)
    return path


def edit(path: Path, **changes: Any) -> None:
    """Other tensors in a file; None takes one out."""
    weights: dict[str, Any] = {**load_file(path), **changes}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path)
